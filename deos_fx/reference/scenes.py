"""Scenes of handwritten digits and questions about them.

Everything is composed at run time from data that scikit-learn ships: 1,797 scanned handwritten
digits (``load_digits``) in front of darkened crops of two photographs (``load_sample_images``).
Training, validation and test scenes share neither a scan nor a piece of a photograph.

A scene is a 144 x 144 image of 3 x 3 coarse cells, 48 pixels each. Three to seven cells hold one
tinted digit each, and the digits of a scene are all different, so that "the 7" is unambiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

__all__ = [
    "BACKDROPS",
    "CELLS",
    "CELL_SIZE",
    "COLORS",
    "COLUMNS",
    "CROPS_PER_BACKDROP",
    "IMAGE_SIZE",
    "KINDS",
    "NUMBERS",
    "PATCH_SIZE",
    "ROWS",
    "SPLITS",
    "Example",
    "Question",
    "Scene",
    "SceneBatch",
    "SceneObject",
    "Split",
    "scans",
]

Split = Literal["train", "validation", "test"]

IMAGE_SIZE = 144
PATCH_SIZE = 12
GRID = IMAGE_SIZE // PATCH_SIZE
CELL_SIZE = IMAGE_SIZE // 3
WINDOW = 32

TINTS = {
    "red": (235, 50, 50),
    "green": (60, 215, 70),
    "blue": (70, 115, 255),
    "yellow": (245, 225, 50),
    "white": (245, 245, 245),
}
COLORS = tuple(TINTS)
BACKDROPS = ("temple", "flower")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
KINDS = ("at", "color", "where", "left_of", "count", "count_color", "scene", "most")

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CROPS_PER_BACKDROP = 192

# The region of each photograph that a split may crop: (left, top, right, bottom). The subject of
# either photograph is nearly symmetric; training sees its left side, the others its right side.
_REGIONS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "train": ((0, 0, 214, 427), (0, 0, 308, 427)),
    "validation": ((214, 0, 428, 213), (308, 0, 616, 213)),
    "test": ((214, 213, 428, 427), (308, 213, 616, 427)),
}


@dataclass(frozen=True)
class SceneObject:
    """One digit of a scene.

    Attributes:
        digit: The digit, 0 to 9.
        color: Its color, one of ``COLORS``.
        cell: The coarse cell that it stands in, one of ``CELLS``.
        box: Extent of its ink in pixels, ``(x0, y0, x1, y1)``, ends exclusive.
    """

    digit: int
    color: str
    cell: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Question:
    """A question about a scene, of one of ``KINDS``, and its answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class SceneBatch:
    """Scenes as arrays: the form in which they are sampled, rendered and trained on.

    B is the number of scenes and N the number of objects in all of them.

    Attributes:
        backdrop: Index into ``BACKDROPS``, int ``[B]``.
        crop: Number of the prepared crop of the photograph in the background, int ``[B]``.
        light: Brightness of the backdrop, float ``[B]``.
        owner: The scene that an object belongs to, ascending, int ``[N]``.
        cell: Index into ``CELLS``, or -1 in a mosaic, int ``[N]``.
        digit: The digit, int ``[N]``.
        color: Index into ``COLORS``, int ``[N]``.
        scan: Index into :func:`scans`, int ``[N]``.
        center: Center in pixels, x and y, float ``[N, 2]``.
        size: Side of the scan in pixels, float ``[N]``.
        angle: Rotation in radians, float ``[N]``.
        stretch: Logarithm of the factor by which it is taller and narrower than the scan, float
            ``[N]``.
        split: The split that scans and crops are from.
    """

    backdrop: np.ndarray
    crop: np.ndarray
    light: np.ndarray
    owner: np.ndarray
    cell: np.ndarray
    digit: np.ndarray
    color: np.ndarray
    scan: np.ndarray
    center: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    stretch: np.ndarray
    split: Split

    def __len__(self) -> int:
        return len(self.backdrop)

    @cached_property
    def origin(self) -> np.ndarray:
        """Return the upper left pixel of each object's window, x and y, int ``[N, 2]``."""
        return np.round(self.center).astype(int) - WINDOW // 2

    @cached_property
    def ink(self) -> np.ndarray:
        """Return the opacity of each object in its window, float32 ``[N, WINDOW, WINDOW]``."""
        # Map window pixels to scan coordinates and interpolate bilinearly in the padded scan.
        pixels = self.origin[:, :, None] + np.arange(WINDOW) + 0.5 - self.center[:, :, None]
        # Rotate back, scale 8 x 8 pixels to the size, and undo the stretch.
        x, y = pixels[:, 0, None, :], pixels[:, 1, :, None]
        scale = (8 / self.size)[:, None, None]
        cos, sin = np.cos(self.angle)[:, None, None], np.sin(self.angle)[:, None, None]
        stretch = np.exp(self.stretch)[:, None, None]
        u = np.clip((cos * x + sin * y) * scale * stretch + 4.5, 0, 8.999)
        v = np.clip((cos * y - sin * x) * scale / stretch + 4.5, 0, 8.999)
        left, top = u.astype(int), v.astype(int)
        u, v = (u - left).astype(np.float32), (v - top).astype(np.float32)
        padded = np.pad(scans()[0], ((0, 0), (1, 1), (1, 1)))[self.scan].ravel()
        # Flat indices of the upper left of the four neighbours, in padded scans of 10 x 10 pixels.
        at = np.arange(len(self.scan))[:, None, None] * 100 + top * 10 + left
        upper = padded[at] * (1 - u) + padded[at + 1] * u
        lower = padded[at + 10] * (1 - u) + padded[at + 11] * u
        return np.clip(1.4 * (upper * (1 - v) + lower * v), 0, 1)

    def boxes(self) -> np.ndarray:
        """Return the extent of the clearly visible ink, ``x0, y0, x1, y1``, int ``[N, 4]``."""
        visible = self.ink > 0.25
        ends = []
        for axis, origin in ((1, self.origin[:, 0]), (2, self.origin[:, 1])):
            line = np.asarray(visible.any(axis))
            ends.append((origin + line.argmax(1), origin + WINDOW - line[:, ::-1].argmax(1)))
        (x0, x1), (y0, y1) = ends
        return np.clip(np.stack([x0, y0, x1, y1], 1), 0, IMAGE_SIZE)

    def shares(self) -> np.ndarray:
        """Return the fraction of each object's ink in each patch, float ``[N, GRID * GRID]``."""
        pixels = self.origin[:, :, None] + np.arange(WINDOW)
        inside = (pixels >= 0) & (pixels < IMAGE_SIZE)
        patch = np.clip(pixels // PATCH_SIZE, 0, GRID - 1)
        ink = self.ink * (inside[:, 1, :, None] & inside[:, 0, None, :])
        # One bin for each object and patch.
        at = np.arange(len(ink))[:, None, None] * GRID**2
        at = at + patch[:, 1, :, None] * GRID + patch[:, 0, None, :]
        mass = np.bincount(at.ravel(), ink.ravel(), len(ink) * GRID**2).reshape(len(ink), -1)
        return mass / self.ink.sum((1, 2))[:, None]

    def render(self) -> np.ndarray:
        """Draw the scenes.

        Returns:
            uint8 ``[B, IMAGE_SIZE, IMAGE_SIZE, 3]``.
        """
        # A border as wide as a window, so that windows over the edge need no cutting.
        pad = WINDOW
        behind = _crops(self.split)[self.backdrop, self.crop] * self.light[:, None, None, None]
        canvas = np.pad(behind, ((0, 0), (pad, pad), (pad, pad), (0, 0))).astype(np.float32)
        tints = np.array(list(TINTS.values()), np.float32)[self.color]
        for owner, (x, y), ink, tint in zip(
            self.owner, self.origin + pad, self.ink[..., None], tints, strict=True
        ):
            # A view: blending in place draws on the canvas.
            window = canvas[owner, y : y + WINDOW, x : x + WINDOW]
            window += ink * (tint - window)
        return np.round(canvas[:, pad:-pad, pad:-pad]).astype(np.uint8)

    def select(self, index: int) -> SceneBatch:
        """Return the scene at ``index`` as a batch of one."""
        # Owners ascend, so the objects of a scene are a run.
        rows = slice(*np.searchsorted(self.owner, [index, index + 1]))
        per_object = {
            name: getattr(self, name)[rows]
            for name in ("cell", "digit", "color", "scan", "center", "size", "angle", "stretch")
        }
        per_scene = {
            name: getattr(self, name)[index : index + 1] for name in ("backdrop", "crop", "light")
        }
        owner = np.zeros(rows.stop - rows.start, int)
        return SceneBatch(**per_scene, **per_object, owner=owner, split=self.split)

    def scenes(self) -> list[Scene]:
        """Return the scenes of the batch with their questions; images are drawn lazily."""
        boxes = self.boxes()
        objects: list[list[SceneObject]] = [[] for _ in range(len(self))]
        for n, owner in enumerate(self.owner):
            x0, y0, x1, y1 = (int(end) for end in boxes[n])
            objects[owner].append(
                SceneObject(
                    int(self.digit[n]),
                    COLORS[self.color[n]],
                    CELLS[self.cell[n]],
                    (x0, y0, x1, y1),
                )
            )
        return [
            Scene(tuple(things), BACKDROPS[self.backdrop[i]], self, i)
            for i, things in enumerate(objects)
        ]


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene: an image, its objects, and every question that can be asked about it.

    Attributes:
        objects: The digits, in reading order.
        backdrop: The subject of the photograph behind them, one of ``BACKDROPS``.
        batch: The arrays that the scene is drawn from.
        index: The place of the scene in ``batch``.
    """

    objects: tuple[SceneObject, ...]
    backdrop: str
    batch: SceneBatch
    index: int

    @cached_property
    def image(self) -> Image.Image:
        """Return the scene as an RGB image of ``IMAGE_SIZE`` x ``IMAGE_SIZE`` pixels."""
        return Image.fromarray(self.batch.select(self.index).render()[0])

    @cached_property
    def questions(self) -> list[Question]:
        """Return every question with a well-defined answer."""
        return list(_questions(self.objects, self.backdrop))


@dataclass(frozen=True, eq=False)
class Example:
    """One question about one scene."""

    scene: Scene
    question: Question


def _questions(objects: tuple[SceneObject, ...], backdrop: str) -> Iterator[Question]:
    """Yield every question that has exactly one right answer."""
    by_cell = {thing.cell: thing for thing in objects}
    for thing in objects:
        row, column = thing.cell.split()
        yield Question("at", f"what is at {thing.cell}", str(thing.digit))
        yield Question("color", f"what color is the {thing.digit}", thing.color)
        yield Question("where", f"where is the {thing.digit}", thing.cell)
        beside = COLUMNS.index(column) - 1
        neighbor = by_cell.get(f"{row} {COLUMNS[beside]}") if beside >= 0 else None
        if neighbor:
            text = f"what is left of the {thing.digit}"
            yield Question("left_of", text, str(neighbor.digit))
    colors = Counter(thing.color for thing in objects)
    yield Question("count", "how many digits", NUMBERS[len(objects)])
    for color in COLORS:
        yield Question("count_color", f"how many {color} digits", NUMBERS[colors[color]])
    yield Question("scene", "what is behind", backdrop)
    # Asked only if one color is ahead of all others.
    (first, most), *rest = colors.most_common(2)
    if not rest or rest[0][1] < most:
        yield Question("most", "most common color", first)


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Return all scanned digits, in a fixed shuffled order.

    Returns:
        Ink from 0 to 1, float32 ``[1797, 8, 8]``, and the digits, int ``[1797]``.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order] / 16).astype(np.float32), digits.target[order]


@cache
def _crops(split: Split) -> np.ndarray:
    """Return square crops of the photographs, uint8 ``[2, crops, IMAGE_SIZE, IMAGE_SIZE, 3]``."""
    rng = np.random.default_rng([7, SPLITS.index(split)])
    crops = []
    for photograph, region in zip(load_sample_images().images, _REGIONS[split], strict=True):
        part = Image.fromarray(photograph).crop(region)
        for _ in range(CROPS_PER_BACKDROP):
            side = int(rng.integers(100, 190))
            x, y = (int(rng.integers(0, length - side)) for length in part.size)
            crop = part.resize((IMAGE_SIZE, IMAGE_SIZE), box=(x, y, x + side, y + side))
            crops.append(np.asarray(crop)[:, :: rng.choice([-1, 1])])
    return np.stack(crops).reshape(len(BACKDROPS), -1, IMAGE_SIZE, IMAGE_SIZE, 3)
