"""Find by gradients which patches make which visual token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deos_fx.errors import NoGroups

__all__ = ["groups_of", "tokens_of"]


def tokens_of(features: Tensor, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Find the tokens that read hidden states directly, without another block in between.

    Every token has a number of its own, in which equally many bits are set. Bit by bit, the tokens
    that have it set are asked for what they depend on: a patch that is part of one token gets a
    gradient for just the bits of its number, and one that is part of several for more.

    Args:
        features: [T, d].
        made: Block -> the leaf of its hidden states, of n patches.

    Returns:
        Block -> number [n] of the token of every patch, -1 if it is part of none; only of blocks
        that the features read.
    """
    numbers = _numbers(len(features)).to(features.device)
    # A random direction: the sum of a normalised vector would have no gradient.
    direction = torch.randn(features.shape[-1], device=features.device).to(features)
    leaves = list(made.values())

    def reached(flags: Tensor) -> list[Tensor | None]:
        """Return for each leaf the flags of the patches that some flagged tokens depend on."""
        gradients = torch.autograd.grad(
            features,
            leaves,
            flags[:, None] * direction,
            retain_graph=True,
            allow_unused=True,
        )
        return [None if x is None else x.flatten(0, -2).ne(0).any(dim=-1) for x in gradients]

    if not features.requires_grad:
        return {}
    bits = [reached(of_tokens.to(features)) for of_tokens in numbers.T]
    tokens = {}
    for i, asked in zip(made, zip(*bits, strict=True), strict=True):
        found = [one for one in asked if one is not None]
        if found:
            # [n, bits] -> which number it is
            tokens[i] = _token_of(torch.stack(found, dim=-1), numbers, features)
    return tokens


def _numbers(count: int) -> Tensor:
    """Return flags [T, bits] of different numbers, of whose bits half are set."""
    bits = next(bits for bits in itertools.count(1) if math.comb(bits, bits // 2) >= count)
    chosen = itertools.combinations(range(bits), max(1, bits // 2))
    places = torch.tensor(list(itertools.islice(chosen, count)))
    return torch.zeros(count, bits, dtype=torch.bool).scatter(1, places, True)


def _token_of(asked: Tensor, numbers: Tensor, features: Tensor) -> Tensor:
    """Return the token [n] of every patch from the bits [n, b] that it got a gradient for.

    Raises:
        NoGroups: If these are no number: the patch is part of several tokens.
    """
    weights = 1 << torch.arange(numbers.shape[1], device=numbers.device)
    known, order = (numbers * weights).sum(dim=1).sort()
    given = (asked * weights).sum(dim=1)
    place = torch.searchsorted(known, given).clamp(max=len(known) - 1)
    if ((known[place] != given) & (given != 0)).any():
        raise NoGroups(_why_shared(features))
    return torch.where(given == 0, -1, order[place])


def _why_shared(features: Tensor) -> str:
    """Say why patches are part of several visual tokens each, by what computed the features."""
    seen, todo = set[Any](), [features.grad_fn]
    while todo:
        step = todo.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        todo += [before for before, _ in step.next_functions]
    names = {step.name() for step in seen}
    if any("Convolution" in name for name in names):
        return "convolutions make visual tokens of patches that other tokens are made of, too"
    if any("Softmax" in name or "Attention" in name for name in names):
        return "queries read all patches of an image, so no visual token goes with a patch"
    return "a patch is part of several visual tokens"


def groups_of(tokens: Sequence[Tensor], count: int) -> Tensor:
    """Turn the token of every patch, found at every depth that is read, into groups [T, s]."""
    token_of = tokens[0].cpu()
    if any(not token_of.equal(other.cpu()) for other in tokens):
        raise NoGroups("features of several depths are made of other patches each")
    sizes = torch.bincount(token_of[token_of >= 0], minlength=count)
    # A token of no patch is a learned vector, such as the end of a row.
    size, *others = sizes[sizes > 0].unique().tolist() or [0]
    if not size:
        raise NoGroups("no patch of its blocks reaches the visual tokens")
    if others:
        raise NoGroups("the visual tokens are not made of equally many patches")
    order = token_of.argsort(stable=True)
    return order[(token_of < 0).sum() :].reshape(-1, size)
