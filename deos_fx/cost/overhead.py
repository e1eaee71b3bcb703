"""Count the FLOPs of reductions themselves: their matrix products, and the attention they observe.

1. The cost of a policy is exact: its reductions run on tensors that have shapes and no data, so
   every score and selector is counted as it is.
2. A search needs a gradient, so for it the same operations are written as a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deos_fx.attention.observation import OBSERVED, Observation
from deos_fx.cost.amounts import Amount
from deos_fx.cost.parts import BlockCost
from deos_fx.cost.twin import count_flops
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce
from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.layout import grid_after

__all__ = [
    "Seen",
    "Site",
    "SiteSizes",
    "Together",
    "known_grid_after",
    "observations",
    "operator_flops",
    "relaxed_flops",
]


# *** the operator ***


@dataclass(frozen=True)
class SiteSizes:
    """Sizes at a site, besides the number of its visual tokens.

    Attributes:
        width: Size of a hidden state, all its streams together.
        key: Size of a key of one head.
        joint_key: Size of the keys of all heads together.
        text: Number of text tokens, padding included.
        normed: Size of a hidden state after the final norm, if another.
    """

    width: int
    key: int
    joint_key: int
    text: int
    normed: int = 0


def operator_flops(
    reduction: Reduction, before: int, after: int, sizes: SiteSizes, grid: Tensor | None
) -> int:
    """Count the FLOPs of one reduction, for one row of the batch.

    Args:
        reduction: The reduction; its ``keep`` is not read.
        before: Visual tokens that come in.
        after: Visual tokens that come out.
        sizes: Sizes at the site.
        grid: Image, row and column of the tokens that come in, [V, 3], while they are the same in
            all rows; None after a choice by score.
    """
    flops = 0

    def call(function: Callable[..., Any], *args: Any) -> Any:
        # `static_reduce` makes every call through this function, as lowering does with graph nodes.
        nonlocal flops
        leaves = pytree.tree_leaves(args)
        if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
            # Case: a constant of the graph, which costs nothing when it runs.
            return function(*args)
        args = pytree.tree_map_only(Tensor, lambda value: value.to("meta"), args)
        with count_flops() as counter:
            result = function(*args)
        flops += counter.get_total_flops()
        return result

    features = _Features(before, sizes, grid)
    with torch.no_grad():
        static_reduce(reduction, after, features["tokens"], None, features, call)
    return flops


class _Features(dict[str, Tensor]):
    """Features of one row by name, with the right shapes and no data."""

    def __init__(self, tokens: int, sizes: SiteSizes, grid: Tensor | None) -> None:
        super().__init__()
        self.shapes = {
            "tokens": (tokens, sizes.width),
            "normed_tokens": (tokens, sizes.normed or sizes.width),
            "class_token": (1, sizes.width),
            "grid": (tokens, 3),
            "sides": (2,),
            "keys": (tokens, sizes.key),
            "joint_keys": (tokens, sizes.joint_key),
            "text_tokens": (sizes.text, sizes.width),
            "normed_text": (sizes.text, sizes.normed or sizes.width),
            "text_keys": (sizes.text, sizes.joint_key),
            "text_mask": (sizes.text,),
            "text_score": (sizes.text,),
        }
        # Attention is one number per key, of which the visual ones remain.
        attention = [name for name, (it, _) in OBSERVED.items() if it.kind == "attention"]
        self.shapes |= dict.fromkeys(attention, (tokens,))
        if grid is not None:
            self["grid"] = grid

    def __missing__(self, name: str) -> Tensor:
        # "keys@next" has the shape of "keys".
        return torch.empty(1, *self.shapes[name.partition("@")[0]], device="meta")


def relaxed_flops(reduction: Reduction, before: Amount, after: Amount, sizes: SiteSizes) -> Amount:
    """Compute `operator_flops` by a formula that covers everything a search can vary.

    Args:
        reduction: The reduction; its ``keep`` is not read.
        before: Visual tokens that come in.
        after: Visual tokens that come out.
        sizes: Sizes at the site.
    """
    learned = reduction.learned
    directions = learned["metric"].shape[1] if "metric" in learned else 0
    widths = {"feature": sizes.width, "key": sizes.key, "joint_key": sizes.joint_key, "grid": 0}
    widths |= {"centred": sizes.width, "learned": directions}
    compared = sum(widths[kind] for kind in reduction.similarity)
    moved = after * (before - after)
    total: Amount = 0
    # Similarities of all pairs, of dropped tokens with kept ones, and the transfer itself.
    if "novelty" in reduction.scores and reduction.uses_scores:
        total += 2 * sizes.width * before * before
    if reduction.selector == "greedy":
        total += 2 * compared * before * before
    if reduction.gain and reduction.temperature != math.inf:
        total += 2 * compared * moved
    if reduction.transfers:
        total += 2 * sizes.width * moved
    return total + _score_flops(reduction, before, sizes, directions)


def _score_flops(reduction: Reduction, before: Amount, sizes: SiteSizes, directions: int) -> Amount:
    """Compute the FLOPs of scores and directions that look at each token on its own."""
    # Products of each token with so many vectors of its width.
    vectors = directions if reduction.selector == "greedy" or reduction.gain else 0
    total: Amount = 0
    vectors += len({"text_relevance", "text_irrelevance"} & reduction.scores.keys())
    for name in reduction.learned.scores:
        part = reduction.learned[name]
        if name == "text":
            rank = part.shape[1]
            vectors += rank
            # The words along the directions, and their sum with every token.
            total += 2 * rank * (sizes.text * sizes.width + before)
        elif name != "place":
            vectors += part.shape[1] if part.dim() == 2 else 1
    return total + 2 * sizes.width * vectors * before


# *** what it observes ***


def known_grid_after(reduction: Reduction, count: int, grid: Tensor | None) -> Tensor | None:
    """Return the part of a known grid [V, 3] that stays; None where that depends on the input."""
    # A search also asks for counts that the grid cannot be divided into.
    try:
        return None if grid is None else grid_after(reduction, count, grid)
    except ValueError:
        return None


@dataclass
class Together:
    """Tokens reduced together: those of one image, or inside the decoder those of one prompt.

    Attributes:
        rows: How many such groups a prompt has.
        images: Visual tokens of each of the group's images before any reduction.
        present: Tokens of the group that are left.
        grid: Image, row and column of the tokens that are left, [V, 3]; None if that depends on
            the input.
    """

    rows: int
    images: tuple[int, ...]
    present: int
    grid: Tensor | None


Seen: TypeAlias = tuple[str, Observation, str]
"""Place (empty, ``next`` or a block's site), observation and queries of an observed feature."""


def observations(reduction: Reduction) -> set[Seen]:
    """Return everything that the reduction observes, each once."""
    needs = (need.partition("@") for need in required_features(reduction))
    return {(where, *OBSERVED[name]) for name, _, where in needs if name in OBSERVED}


@dataclass(frozen=True)
class Site:
    """The surroundings of a site.

    Attributes:
        stage: ``vision``, ``projector`` or ``decoder``.
        block: The block before it; None if blocks cannot be told apart.
        following: The block after it, if there is one.
        others: Tokens of a row that are not visual.
        sizes: Sizes of the features there.
        per_token: Patches of a visual token, in the tower.
    """

    stage: str
    block: BlockCost | None
    following: BlockCost | None
    others: int
    sizes: SiteSizes
    per_token: int = 1

    def observed_flops(
        self, seen: set[Seen], attended: Amount, visual: Amount, text: int
    ) -> Amount:
        """Compute the FLOPs of observations, for one row of the batch.

        The formulas are in `deos_fx.passes.observe.features`.

        Args:
            seen: The observations.
            attended: Visual tokens in the block before the site.
            visual: Visual tokens at the site.
            text: Text tokens.
        """
        total: Amount = 0
        for where, observation, of in seen:
            block, tokens = self.block, self.others + self.per_token * attended
            if where == "next":
                block, tokens = self.following, self.others + visual
            assert block is not None, "a site without blocks has no features of attention"
            # In the tower the queries of all tokens count, class tokens included.
            every = visual if self.stage == "decoder" else tokens
            queries = {"class": 1, "last": 1, "text": text, "raters": text, "visual": every}
            if of:
                total += block.row_flops(queries[of], tokens)
            if observation.gravity:
                total += 4 * block.dim * queries[of] * tokens
        # The next block computes these once more for itself, so observing them costs extra.
        if self.following is not None and any(where == "next" for where, _, _ in seen):
            total += self.following.peek_flops(self.others + visual)
        return total
