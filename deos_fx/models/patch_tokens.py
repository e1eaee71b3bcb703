"""Find by gradients which patches make which visual token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deos_fx.errors import NoGroups

__all__ = ["groups_of", "tokens_of"]


def tokens_of(features: Tensor, made: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Find the tokens that read hidden states directly, without another block in between.

    Every token has a number, whose bits are asked for one by one: a patch gets a gradient from the
    tokens in whose number the bit is set if and only if it is part of one of them.

    Args:
        features: [T, d].
        made: Block -> the leaf of its hidden states, of n patches.

    Returns:
        Block -> number [n] of the token of every patch, -1 if it is part of none; only of blocks
        that the features read.
    """
    numbers = torch.arange(len(features), device=features.device)
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
    every = reached(torch.ones_like(features[:, 0]))
    tokens = {
        i: torch.where(fed, 0, -1) for i, fed in zip(made, every, strict=True) if fed is not None
    }
    for bit in range((len(features) - 1).bit_length()):
        is_set = (numbers >> bit) & 1
        for i, one, zero in zip(
            made, reached(is_set.to(features)), reached((1 - is_set).to(features)), strict=True
        ):
            if i not in tokens or one is None or zero is None:
                continue
            if (one & zero).any():
                raise NoGroups(_why_shared(features))
            tokens[i] += one.to(tokens[i]) << bit
    return tokens


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
