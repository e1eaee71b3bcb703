"""Record what reductions did to a batch of prompts.

`SiteExplanation` counts prompt positions, as the model does; `TokenStep` counts the patches of one
image, as a drawing does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from deos_fx.results.drawn import Drawn
from deos_fx.results.token_drawing import Move, TokenStep
from deos_fx.words import counted

__all__ = ["Explanation", "SiteExplanation", "token_steps"]

SHOWN_SHARE = 0.25
"""A dropped token's move is drawn if at least this share of what leaves it goes there."""


# *** the record ***


@dataclass(frozen=True, eq=False, repr=False)
class SiteExplanation:
    """The effect of one reduction: in B prompts, K of V visual tokens stayed.

    Positions are indices into the original prompt, padding included. All tensors are on the CPU.

    Attributes:
        site: The site of the reduction.
        positions_in: [B, V] positions of the visual tokens that came in.
        kept: [B, K] positions of the tokens that stayed, in their order; -1 for a copy of the CLS
            token.
        dropped: [B, V - K] positions of the others; -1 for a copy of the CLS token.
        destination: [B, K, V] how much of the content of each incoming token was added to each
            kept one, g P u of the operator; 0 for kept tokens. None if nothing was transferred.
        mass: [B, K] how many original tokens each kept one stands for.
        scores: [B, V] scores that ranked the incoming tokens; None if only their places did.
        remaining: [B, M] positions of everything that is left of the prompt, text included. Tokens
            that are not in the order of the image stand at its first placeholders, or at its last
            ones if the prompt ends there.
    """

    site: str
    positions_in: Tensor
    kept: Tensor
    dropped: Tensor
    destination: Tensor | None
    mass: Tensor
    scores: Tensor | None
    remaining: Tensor

    def __repr__(self) -> str:
        return f"SiteExplanation({self})"

    def __str__(self) -> str:
        kept, incoming = self.kept.shape[1], self.positions_in.shape[1]
        went = "dropped" if self.destination is None else "merged into them"
        return (
            f"{self.site}: {kept} of {counted(incoming, 'visual token')} kept, the others {went}, "
            f"masses {self.mass.min():.3g} to {self.mass.max():.3g}"
        )


class Explanation(list[SiteExplanation]):
    """The effect of every reduction, from input to output of the model.

    Args:
        sites: The effect of each.
        regimes: The regime of each.
        grids: Rows and columns of the visual tokens of every image of a prompt, in the order of the
            tokens. A tile of an image counts as one, or all tiles put together do, where a model
            reads them so; empty if it is not known where tokens lie.
    """

    def __init__(
        self,
        sites: Iterable[SiteExplanation],
        regimes: Sequence[str] = (),
        grids: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(sites)
        self.regimes = regimes
        self.grids = grids

    def steps(self, row: int = 0) -> list[list[TokenStep]]:
        """Return the effects on each image of a prompt, counted in its patches.

        Args:
            row: The prompt.

        Raises:
            ValueError: If it is not known where the tokens lie.
        """
        if not self.grids:
            raise ValueError(
                "where the visual tokens lie on the image is not known for this model: they are "
                "not in a grid, or the model does not say in which"
            )
        if not self:
            return [[] for _ in self.grids]
        of_images = self[0].positions_in[row].split([math.prod(grid) for grid in self.grids])
        return [token_steps(self, self.regimes, own, row) for own in of_images]

    def draw(self, images: Sequence[Image.Image], prompt: str = "", row: int = 0) -> Drawn:
        """Draw the effects on the images of a prompt, to save as a page or as a picture.

        Args:
            images: The images of the prompt as the model is given them, tiles of an image apart;
                `deos_fx.data.frames` makes them of a processor's output.
            prompt: The words of the prompt, for the page.
            row: The prompt.

        Raises:
            ValueError: If it is not known where the visual tokens lie on the images, or there are
                more images or fewer.
        """
        steps = self.steps(row)
        if len(images) != len(steps):
            raise ValueError(
                f"{counted(len(images), 'image')} to draw on, but the prompt has {len(steps)} (a "
                "tile counts as one): give as many"
            )
        return Drawn(images, self.grids, steps, prompt)


# *** the effect on one image, counted in patches ***


def token_steps(
    explanations: Sequence[SiteExplanation],
    regimes: Iterable[str],
    visual: Tensor,
    row: int,
) -> list[TokenStep]:
    """Turn explanations, which count prompt positions, into steps, which count patches.

    Args:
        explanations: The result of `ReducedModel.explain`.
        regimes: The regime of each reduction.
        visual: [V] prompt positions of the image's visual tokens.
        row: The prompt to draw.

    Returns:
        A step for each site, in order.
    """
    # Positions that are not in it, of other images or a copy of CLS (-1), have no patch.
    patch = {int(position): i for i, position in enumerate(visual)}
    steps = []
    for explanation, regime in zip(explanations, regimes, strict=True):
        incoming = [patch.get(int(p)) for p in explanation.positions_in[row]]
        kept = [patch.get(int(p)) for p in explanation.kept[row]]
        weights = explanation.destination[row] if explanation.destination is not None else None
        moves = _moves(weights, kept, incoming) if weights is not None else []
        steps.append(
            TokenStep(
                explanation.site,
                regime,
                tuple(p for p in incoming if p is not None),
                tuple(p for p in kept if p is not None),
                tuple(moves),
            )
        )
    return steps


def _moves(
    weights: Tensor, kept: Sequence[int | None], incoming: Sequence[int | None]
) -> Iterable[Move]:
    """Yield the larger parts of the assignment [K, V_in] as moves between patches of one image."""
    # A soft assignment spreads a token over all others; only its larger parts are drawn.
    drawn = (weights > 0) & (weights >= SHOWN_SHARE * weights.sum(dim=0))
    for j, i in drawn.T.nonzero().tolist():
        source, target = incoming[j], kept[i]
        if source is not None and target is not None and source != target:
            yield Move(source, target, float(weights[i, j]))
