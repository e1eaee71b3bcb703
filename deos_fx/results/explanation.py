"""Record what a reduction did to a batch of prompts, and draw it on an image.

`SiteExplanation` counts prompt positions, as the model does; `TokenStep` counts the patches of one
image, as a drawing does.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

__all__ = ["Move", "SiteExplanation", "TokenStep", "draw_image", "draw_step", "token_steps"]

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
        kept, incoming = self.kept.shape[1], self.positions_in.shape[1]
        went = "dropped" if self.destination is None else "merged into them"
        return (
            f"SiteExplanation({self.site}: {kept} of {incoming} visual tokens kept, the others "
            f"{went}, masses {self.mass.min():.3g} to {self.mass.max():.3g})"
        )


# *** the effect on one image, counted in patches ***


@dataclass(frozen=True)
class Move:
    """The move of a part of a dropped token to a kept one; patches are counted row by row."""

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class TokenStep:
    """The effect of one reduction on the tokens of one prompt's first image.

    Attributes:
        site: The site of the reduction.
        regime: The regime of the reduction.
        before: Patches whose tokens were there before.
        kept: Patches whose tokens stayed.
        moves: Where the content of the others went.
    """

    site: str
    regime: str
    before: tuple[int, ...]
    kept: tuple[int, ...]
    moves: tuple[Move, ...]


def token_steps(
    explanations: Sequence[SiteExplanation],
    regimes: Iterable[str],
    visual: Tensor,
    row: int,
    patches: int,
) -> list[TokenStep]:
    """Turn explanations, which count prompt positions, into steps, which count patches.

    Args:
        explanations: The result of `ReducedModel.explain`.
        regimes: The regime of each reduction.
        visual: [B, V] prompt positions of the visual tokens.
        row: The prompt to draw.
        patches: Visual tokens of one image.

    Returns:
        A step for each site, in order.
    """
    # Positions that are not in it, of other images or a copy of CLS (-1), have no patch.
    patch = {int(position): i for i, position in enumerate(visual[row]) if i < patches}
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
    for j, source in enumerate(incoming):
        # A soft assignment spreads a token over all others; only its larger parts are drawn.
        total = float(weights[:, j].sum())
        for i, target in enumerate(kept):
            weight = float(weights[i, j])
            drawn = weight > 0 and weight >= SHOWN_SHARE * total
            if drawn and source is not None and target is not None and source != target:
                yield Move(source, target, weight)


# *** SVG ***


def draw_image(image: Image.Image, name: str) -> str:
    """Draw the image itself; `draw_step` refers to it by its name.

    Args:
        image: Any image.
        name: An identifier, unique on the page.

    Returns:
        An SVG element.
    """
    # PNG keeps small images exact; as base64 they need no other file.
    width, height = image.size
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="the image">'
        f'<image id="{name}" width="{width}" height="{height}" '
        f'href="data:image/png;base64,{data}"/></svg>'
    )


def draw_step(step: TokenStep, image: Image.Image, name: str, grid: tuple[int, int]) -> str:
    """Draw the image after a reduction: kept tokens outlined, dropped ones dimmed, moves as lines.

    Args:
        step: The effect of the reduction.
        image: The image that `draw_image` drew.
        name: Its identifier there.
        grid: Rows and columns of patches.

    Returns:
        An SVG element.
    """
    width, height = image.size
    cell = (width / grid[1], height / grid[0])
    kept = set(step.kept)
    gone = [patch for patch in range(grid[0] * grid[1]) if patch not in kept]
    # From back to front. The image is in the page once, and all drawings refer to it.
    parts = [f'<use href="#{name}"/>']
    # Tokens that earlier reductions dropped are drawn darker than those of this one.
    earlier = set(gone) - set(step.before)
    for patch in gone:
        kind = "earlier" if patch in earlier else "gone"
        parts.append(f'<rect class="{kind}" {_box(patch, grid, cell, 0.0)}/>')
    parts += [f'<rect class="kept" {_box(patch, grid, cell, 0.7)}/>' for patch in sorted(kept)]
    parts += [_line(move, grid, cell) for move in step.moves]
    label = f"{len(kept)} of {len(step.before)} tokens are left after {step.site}"
    return (
        f'<svg viewBox="0 0 {width} {height}" class="tokens {step.regime}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )


def _box(patch: int, grid: tuple[int, int], cell: tuple[float, float], inset: float) -> str:
    row, column = divmod(patch, grid[1])
    return (
        f'x="{column * cell[0] + inset:g}" y="{row * cell[1] + inset:g}" '
        f'width="{cell[0] - 2 * inset:g}" height="{cell[1] - 2 * inset:g}"'
    )


def _line(move: Move, grid: tuple[int, int], cell: tuple[float, float]) -> str:
    (y1, x1), (y2, x2) = divmod(move.source, grid[1]), divmod(move.target, grid[1])
    ends = (x1 + 0.5) * cell[0], (y1 + 0.5) * cell[1], (x2 + 0.5) * cell[0], (y2 + 0.5) * cell[1]
    places = " ".join(
        f'{key}="{end:g}"' for key, end in zip(("x1", "y1", "x2", "y2"), ends, strict=True)
    )
    opacity = f"{min(1.0, 0.25 + 0.75 * move.weight):.2f}"
    return (
        f'<line {places} opacity="{opacity}"/>'
        f'<circle cx="{ends[0]:g}" cy="{ends[1]:g}" r="1.1" opacity="{opacity}"/>'
    )
