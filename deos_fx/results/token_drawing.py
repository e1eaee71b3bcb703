"""Draw what a reduction did to the tokens of one image, counted in its patches."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from deos_fx.words import counted

__all__ = ["CELL", "FINE", "Move", "TokenStep", "draw_image", "draw_step", "strength"]

CELL = 12
"""Side of a patch in a drawing; widths of lines are for it."""

FINE = 40
"""Patches on a side from which on kept ones have no outline: it would hide the image."""

MANY = 200
"""Moves of a drawing from which on each is drawn fainter."""


@dataclass(frozen=True)
class Move:
    """The move of a part of a dropped token to a kept one; patches are counted row by row."""

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class TokenStep:
    """The effect of one reduction on the tokens of one image.

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


# *** SVG ***


def draw_image(image: Image.Image, name: str, grid: tuple[int, int]) -> str:
    """Draw the image itself; `draw_step` refers to it by its name.

    Args:
        image: Any image.
        name: An identifier, unique on the page.
        grid: Rows and columns of patches.

    Returns:
        An SVG element.
    """
    # PNG keeps small images exact; as base64 they need no other file.
    width, height = CELL * grid[1], CELL * grid[0]
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="what the model is given">'
        f'<image id="{name}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/></svg>'
    )


def draw_step(step: TokenStep, name: str, grid: tuple[int, int]) -> str:
    """Draw the image after a reduction: kept tokens outlined, dropped ones dark, moves as lines.

    Args:
        step: The effect of the reduction.
        name: The identifier of the image that `draw_image` drew.
        grid: Rows and columns of patches.

    Returns:
        An SVG element.
    """
    width, height = CELL * grid[1], CELL * grid[0]
    kept = set(step.kept)
    gone = [patch for patch in range(grid[0] * grid[1]) if patch not in kept]
    # From back to front. The image is in the page once, and all drawings refer to it.
    parts = [f'<use href="#{name}"/>']
    # Tokens that earlier reductions dropped are drawn darker than those of this one.
    earlier = set(gone) - set(step.before)
    for patch in gone:
        kind = "earlier" if patch in earlier else "gone"
        parts.append(f'<rect class="{kind}" {_box(patch, grid, 0.0)}/>')
    if max(grid) < FINE:
        parts += [f'<rect class="kept" {_box(patch, grid, 0.7)}/>' for patch in sorted(kept)]
    parts += [_line(move, grid, strength(step)) for move in step.moves]
    label = f"{len(kept)} of {counted(len(step.before), 'token')} left after {step.site}"
    return (
        f'<svg viewBox="0 0 {width} {height}" class="tokens {step.regime}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )


def _box(patch: int, grid: tuple[int, int], inset: float) -> str:
    row, column = divmod(patch, grid[1])
    side = CELL - 2 * inset
    return (
        f'x="{column * CELL + inset:g}" y="{row * CELL + inset:g}" '
        f'width="{side:g}" height="{side:g}"'
    )


def strength(step: TokenStep) -> float:
    """Return how opaque the moves of a step are drawn: many that cross would hide the image."""
    return min(1.0, (MANY / max(1, len(step.moves))) ** 0.5)


def _line(move: Move, grid: tuple[int, int], opaque: float) -> str:
    (y1, x1), (y2, x2) = divmod(move.source, grid[1]), divmod(move.target, grid[1])
    ends = [CELL * (place + 0.5) for place in (x1, y1, x2, y2)]
    places = " ".join(
        f'{key}="{end:g}"' for key, end in zip(("x1", "y1", "x2", "y2"), ends, strict=True)
    )
    opacity = f"{opaque * min(1.0, 0.25 + 0.75 * move.weight):.2f}"
    return (
        f'<line {places} opacity="{opacity}"/>'
        f'<circle cx="{ends[0]:g}" cy="{ends[1]:g}" r="1.1" opacity="{opacity}"/>'
    )
