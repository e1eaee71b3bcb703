"""FLOPs of the reductions themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from deos_fx.attention.observation import OBSERVED, Observation
from deos_fx.cost.blocks import Block
from deos_fx.cost.operator_flops import Amount, SiteSizes
from deos_fx.forms.needs import required_features
from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.layout import grid_after

__all__ = ["Seen", "Site", "Together", "known_grid_after", "observations"]


def known_grid_after(reduction: Reduction, count: int, grid: Tensor | None) -> Tensor | None:
    """Return the part of a known grid [V, 3] that stays; None where that depends on the input."""
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
"""Place, observation and queries of an observed feature: see `deos_fx.passes.observe.features`."""


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
    """

    stage: str
    block: Block | None
    following: Block | None
    others: int
    sizes: SiteSizes

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
            block, tokens = self.block, self.others + attended
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
        if self.following is not None and any(where == "next" for where, _, _ in seen):
            total += self.following.projections * (self.others + visual)
        return total
