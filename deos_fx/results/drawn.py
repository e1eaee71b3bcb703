"""Draw what reductions did to the images of a prompt: as a page, and as one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from deos_fx.files import write_file, write_text
from deos_fx.results.page import Section, build_page
from deos_fx.results.search_result import command
from deos_fx.results.token_drawing import CELL, FINE, TokenStep, draw_image, draw_step, strength
from deos_fx.words import counted

__all__ = ["Drawn"]

# Pixels of the longer side of an image on the page.
_LARGEST = 1024
# The picture: pixels of a panel's longer side, of the space around it, and panels in a line.
_PANEL, _SPACE, _PANELS = 480, 16, 4
# Painted larger and then reduced, which smooths lines.
_FINER = 2
# Pixels of an outline that is painted, at most.
_THICKEST = 6.0
# Colours of the page, and how much of the image they hide.
_DARK, _LIGHT, _YELLOW = (5, 7, 10), (255, 255, 255), (255, 213, 74)
_GONE, _EARLIER = 0.72, 0.86
_GIVEN = "what the model is given"


@dataclass(frozen=True)
class Drawn:
    """Reductions drawn on the images of one prompt.

    Attributes:
        images: The images as the model is given them, tiles of an image apart.
        grids: Rows and columns of the visual tokens of each.
        steps: The reductions of each.
        prompt: The words of the prompt, for the page.
    """

    images: Sequence[Image.Image]
    grids: Sequence[tuple[int, int]]
    steps: Sequence[Sequence[TokenStep]]
    prompt: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page, if the name ends in ``.html``, or a picture, if it ends in ``.png``.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the name ends otherwise.
        """
        kind = Path(path).suffix.lower()
        if kind == ".html":
            write_text(path, self.to_html())
        elif kind == ".png":
            picture = self.to_picture()
            write_file(path, lambda part: picture.save(part, "png", optimize=True))
        else:
            raise ValueError(f"{path}: give a name that ends in .html or .png")

    def to_html(self) -> str:
        """Return a self-contained page."""
        whole = sum(math.prod(grid) for grid in self.grids)
        left = sum(len(steps[-1].kept) if steps else math.prod(grid) for steps, grid in self._each)
        title = f"{left} of {counted(whole, 'visual token')} left"
        rows = "".join(self._row(i) for i in range(len(self.images)))
        section = Section(
            "Kept and dropped tokens",
            "A square is a visual token. Bright ones are still there after the reduction, dark "
            "ones are gone, and a yellow line leads from a dropped token (the dot) to the kept one "
            "that takes in its content, brighter with more of it.",
            f'<div class="rows">{rows}</div>',
        )
        lead = f"What a reduced model kept of the image when it was asked: {self.prompt}"
        return build_page(title, lead if self.prompt else "", "", [section], command())

    def to_picture(self) -> Image.Image:
        """Return one picture, a line of panels or more for each image."""
        lines = []
        for i in range(len(self.images)):
            panels = self._panels(i)
            lines += [panels[start : start + _PANELS] for start in range(0, len(panels), _PANELS)]
        heights = [max(panel.height for panel in line) + _SPACE for line in lines]
        width = max(sum(panel.width + _SPACE for panel in line) for line in lines)
        picture = Image.new("RGB", (width + _SPACE, sum(heights) + _SPACE), _LIGHT)
        top = _SPACE
        for line, height in zip(lines, heights, strict=True):
            left = _SPACE
            for panel in line:
                picture.paste(panel, (left, top))
                left += panel.width + _SPACE
            top += height
        return picture

    @property
    def _each(self) -> list[tuple[Sequence[TokenStep], tuple[int, int]]]:
        return list(zip(self.steps, self.grids, strict=True))

    # *** the page ***

    def _row(self, index: int) -> str:
        name, grid = f"image-{index}", self.grids[index]
        image = self.images[index].copy()
        image.thumbnail((_LARGEST, _LARGEST))
        drawings = [(draw_image(image, name, grid), _GIVEN)]
        drawings += [(draw_step(s, name, grid), _caption(s, "→")) for s in self.steps[index]]
        figures = "".join(
            f"<figure>{drawing}<figcaption>{escape(words)}</figcaption></figure>"
            for drawing, words in drawings
        )
        return f'<div class="example"><div class="strip wide">{figures}</div></div>'

    # *** the picture ***

    def _panels(self, index: int) -> list[Image.Image]:
        grid = self.grids[index]
        # Cells of whole pixels, so that all squares are alike.
        side = _FINER * max(1, round(_PANEL / max(grid)))
        image = self.images[index].convert("RGB").resize((side * grid[1], side * grid[0]))
        panels = [_with_words(image, _GIVEN)]
        for step in self.steps[index]:
            panels.append(_with_words(_painted(image, step, grid, side), _caption(step, "to")))
        return panels


def _caption(step: TokenStep, arrow: str) -> str:
    return f"{step.site}: {step.regime} {len(step.before)} {arrow} {len(step.kept)}"


def _painted(image: Image.Image, step: TokenStep, grid: tuple[int, int], side: int) -> Image.Image:
    """Paint what `draw_step` draws; a cell has `side` pixels on each side."""
    # Lines of a coarse grid need not be as thick as its cells are large.
    unit = min(side / CELL, _THICKEST)
    dimmed = {
        share: Image.blend(image, Image.new("RGB", image.size, _DARK), share)
        for share in (_GONE, _EARLIER)
    }
    painted, kept, before = image.copy(), set(step.kept), set(step.before)
    pen = ImageDraw.Draw(painted)
    for patch in range(math.prod(grid)):
        top, left = (side * place for place in divmod(patch, grid[1]))
        box = (left, top, left + side, top + side)
        if patch not in kept:
            painted.paste(dimmed[_GONE if patch in before else _EARLIER].crop(box), box[:2])
        elif max(grid) < FINE:
            inset = (left + 1, top + 1, left + side - 2, top + side - 2)
            pen.rectangle(inset, outline=_LIGHT, width=max(1, round(0.9 * unit)))
    # Moves on a layer of their own, since they let the image shine through.
    layer = Image.new("L", image.size)
    pen, radius = ImageDraw.Draw(layer), max(1.0, 1.1 * unit)
    for move in sorted(step.moves, key=lambda move: move.weight):
        shade = round(255 * strength(step) * min(1.0, 0.25 + 0.75 * move.weight))
        places = divmod(move.source, grid[1]) + divmod(move.target, grid[1])
        y1, x1, y2, x2 = (side * (place + 0.5) for place in places)
        pen.line((x1, y1, x2, y2), fill=shade, width=max(1, round(0.8 * unit)))
        pen.ellipse((x1 - radius, y1 - radius, x1 + radius, y1 + radius), fill=shade)
    painted.paste(_YELLOW, mask=layer)
    return painted


def _with_words(image: Image.Image, words: str) -> Image.Image:
    """Put a line of words below an image, which was painted larger."""
    image = image.reduce(_FINER)
    font = ImageFont.load_default(16)
    width = max(image.width, math.ceil(font.getlength(words)))
    panel = Image.new("RGB", (width, image.height + 28), _LIGHT)
    panel.paste(image, (0, 0))
    ImageDraw.Draw(panel).text((0, image.height + 6), words, fill=_DARK, font=font)
    return panel
