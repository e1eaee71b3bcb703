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
    """Return what a reduction leaves of a known grid [V, 3]; None where it depends on the input."""
    try:
        return None if grid is None else grid_after(reduction, count, grid)
    except ValueError:
        return None


@dataclass
class Together:
    """Tokens that a reduction sees together: of one image, in the decoder of a prompt.

    Attributes:
        rows: How often a prompt has such.
        images: Visual tokens of their images before any reduction.
        present: Tokens that are left.
        grid: Image, row and column of those; None if that depends on the input.
    """

    rows: int
    images: tuple[int, ...]
    present: int
    grid: Tensor | None


Seen: TypeAlias = tuple[str, Observation, str]
"""Where, what and of whose queries: see `deos_fx.passes.observe.features`."""


def observations(reduction: Reduction) -> set[Seen]:
    """What the reduction observes, each once."""
    needs = (need.partition("@") for need in required_features(reduction))
    return {(where, *OBSERVED[name]) for name, _, where in needs if name in OBSERVED}


@dataclass(frozen=True)
class Site:
    """What is there at a site.

    Attributes:
        stage: ``vision``, ``projector`` or ``decoder``.
        block: The block before it.
        following: The block behind it.
        others: Tokens of a row that are not visual.
        sizes: Of features.
    """

    stage: str
    block: Block | None
    following: Block | None
    others: int
    sizes: SiteSizes

    def observed_flops(
        self, seen: set[Seen], attended: Amount, visual: Amount, text: int
    ) -> Amount:
        """Of what is observed, for one row of the batch; formulas in
        `deos_fx.passes.observe.features`.

        Args:
            seen: What is observed.
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
            # In the tower all tokens are asked, class tokens too.
            every = visual if self.stage == "decoder" else tokens
            queries = {"class": 1, "last": 1, "text": text, "raters": text, "visual": every}
            if of:
                total += block.row_flops(queries[of], tokens)
            if observation.gravity:
                total += 4 * block.dim * queries[of] * tokens
        if self.following is not None and any(where == "next" for where, _, _ in seen):
            total += self.following.projections * (self.others + visual)
        return total
