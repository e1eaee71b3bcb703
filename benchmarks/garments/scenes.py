"""Scenes of garments, and questions about them.

A scene is a 144 x 144 image with three to six garments: photographs of Fashion-MNIST, each tinted
in one of five colors, 22 to 46 pixels large, in clusters at any place, partly in front of each
other. Some have a price tag, 12 to 15 pixels large, with a digit scanned from handwriting. Behind
them are gray blocks and gray fragments of other photographs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from deos_fx.reference.scenes import GRID, IMAGE_SIZE, NUMBERS, PATCH_SIZE, Question, Split, scans

from .photographs import GARMENTS, PHOTO_SIZE, Wardrobe

__all__ = ["COLORS", "DIGITS", "KINDS", "PLACES", "Item", "Scene", "SceneBatch", "Tag"]

TINTS = {
    "red": (235, 50, 50),
    "green": (60, 215, 70),
    "blue": (60, 110, 255),
    "yellow": (245, 225, 50),
    "purple": (205, 70, 240),
}
COLORS = tuple(TINTS)
# Those that are told apart best when they are small.
DIGITS = (0, 1, 2, 4, 6, 7)
PLACES = ("top left", "top right", "bottom left", "bottom right")
# The kinds that examples ask. `touch` is taught besides, but not learned well enough to measure by.
KINDS = (
    "color",
    "where",
    "tag",
    "owner",
    "tinted",
    "count",
    "count_garment",
    "count_color",
    "most",
)

# Garments whose silhouettes share this many pixels touch; with fewer, but any, it is not asked.
CONTACT = 24
# A garment this near to the middle of the image is in no quarter, in pixels.
MARGIN = 8

# Where a pixel of the image is: index of its patch, [IMAGE_SIZE, IMAGE_SIZE].
_PATCH = np.arange(IMAGE_SIZE)[:, None] // PATCH_SIZE * GRID + np.arange(IMAGE_SIZE) // PATCH_SIZE


@dataclass(frozen=True)
class Tag:
    """A price tag: its digit, the index of the scan, its upper left pixel (x, y) and its side."""

    digit: int
    scan: int
    corner: tuple[int, int]
    size: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Return rows and columns of the image that the tag covers."""
        return _window(self.corner, self.size)


@dataclass(frozen=True)
class Item:
    """One garment of a scene.

    Attributes:
        garment: What it is, one of ``GARMENTS``.
        color: Its color, one of ``COLORS``.
        photograph: Number of its photograph among those of its split and class.
        corner: Upper left pixel of the photograph, x and y.
        size: Side of the photograph in pixels.
        tag: Its price tag, if it has one.
    """

    garment: str
    color: str
    photograph: int
    corner: tuple[int, int]
    size: int
    tag: Tag | None = None

    @property
    def window(self) -> tuple[slice, slice]:
        """Return rows and columns of the image that the photograph covers."""
        return _window(self.corner, self.size)


def _window(corner: tuple[int, int], size: int) -> tuple[slice, slice]:
    x, y = corner
    return slice(y, y + size), slice(x, x + size)


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene: an image, its garments, and every question that can be asked about it.

    Attributes:
        items: The garments in the order in which they are painted.
        wardrobe: The photographs.
        split: The split that photographs and scans are from.
        ground: Seed of what is behind the garments.
    """

    items: tuple[Item, ...]
    wardrobe: Wardrobe
    split: Split
    ground: int

    @cached_property
    def photographs(self) -> list[np.ndarray]:
        """Return the photographs of the items at their sizes, float32 ``[size, size]``, 0 to 1."""
        pools = self.wardrobe.photographs[self.split]
        found = []
        for item in self.items:
            photograph = Image.fromarray(pools[GARMENTS.index(item.garment)][item.photograph])
            resized = photograph.resize((item.size, item.size), Image.Resampling.BILINEAR)
            found.append(np.asarray(resized, np.float32) / 255)
        return found

    @cached_property
    def opacities(self) -> list[np.ndarray]:
        """Return how opaque the items are, float32 ``[size, size]``, 0 to 1."""
        # What is behind a garment is exactly black in a photograph, and little else is.
        return [np.clip(6 * (photograph - 0.03), 0, 1) for photograph in self.photographs]

    @cached_property
    def owners(self) -> np.ndarray:
        """Return the item seen at each pixel, -1 for none, int ``[IMAGE_SIZE, IMAGE_SIZE]``.

        A tag belongs to its item.
        """
        owners = np.full((IMAGE_SIZE, IMAGE_SIZE), -1)
        for index, (item, opacity) in enumerate(zip(self.items, self.opacities, strict=True)):
            owners[item.window][opacity > 0.5] = index
        for index, item in enumerate(self.items):
            if item.tag is not None:
                owners[item.tag.window] = index
        return owners

    @cached_property
    def coverage(self) -> np.ndarray:
        """Return the share of each patch on which an item is seen, float ``[N, GRID * GRID]``."""
        bins = (self.owners + 1) * GRID**2 + _PATCH
        counts = np.bincount(bins.ravel(), minlength=(len(self.items) + 1) * GRID**2)
        return counts.reshape(-1, GRID**2)[1:] / PATCH_SIZE**2

    @cached_property
    def centers(self) -> np.ndarray:
        """Return the center of what is seen of each item, x and y in pixels, float ``[N, 2]``."""
        y, x = np.nonzero(self.owners >= 0)
        owners = self.owners[y, x]
        area = np.bincount(owners, minlength=len(self.items))
        sums = [np.bincount(owners, axis + 0.5, len(self.items)) for axis in (x, y)]
        return np.stack(sums, 1) / np.maximum(area, 1)[:, None]

    @cached_property
    def contacts(self) -> np.ndarray:
        """Return how many pixels the silhouettes of two items share, int ``[N, N]``."""
        shared = np.zeros((len(self.items), len(self.items)), int)
        seen = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        for index, item in enumerate(self.items):
            seen[item.window] = self.opacities[index] > 0.5
            for other in range(index):
                window = self.items[other].window
                # Case: the photographs do not meet.
                if not _meet(item, self.items[other]):
                    continue
                common = seen[window] & (self.opacities[other] > 0.5)
                shared[index, other] = shared[other, index] = np.count_nonzero(common)
            seen[item.window] = False
        return shared

    @property
    def image(self) -> Image.Image:
        """Return the scene as an RGB image of ``IMAGE_SIZE`` x ``IMAGE_SIZE`` pixels."""
        return Image.fromarray(self.render())

    def render(self) -> np.ndarray:
        """Draw the scene, uint8 ``[IMAGE_SIZE, IMAGE_SIZE, 3]``."""
        canvas = self._ground()
        for item, photograph, opacity in zip(
            self.items, self.photographs, self.opacities, strict=True
        ):
            # The darkest garments keep half of the light of the tint, so that it can be told.
            tinted = (0.45 + 0.55 * photograph[..., None]) * np.float32(TINTS[item.color])
            window = canvas[item.window]
            window += opacity[..., None] * (tinted - window)
        for item in self.items:
            if item.tag is not None:
                canvas[item.tag.window] = _drawn(item.tag)[..., None]
        return np.round(canvas).astype(np.uint8)

    def _ground(self) -> np.ndarray:
        """Draw gray blocks of two sizes and fragments of photographs, without their colors."""
        rng = np.random.default_rng(self.ground)
        light = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for block, low, high in ((18, 10, 75), (5, -15, 15)):
            blocks = rng.uniform(low, high, (2, IMAGE_SIZE // block + 3))
            blocks = (blocks[0][:, None] + blocks[1]) / 2 + rng.uniform(low, high, 1) / 4
            noise = rng.permutation(blocks.ravel()).reshape(blocks.shape)
            y, x = rng.integers(0, block, 2)
            tiled = noise.repeat(block, 0).repeat(block, 1)
            light += tiled[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
        pools = self.wardrobe.photographs[self.split]
        for _ in range(rng.integers(4, 10)):
            pool = pools[rng.integers(len(pools))]
            photograph = pool[rng.integers(len(pool))]
            y, x = rng.integers(0, PHOTO_SIZE - 12, 2)
            part = photograph[y : y + 12, x : x + 12].repeat(2, 0).repeat(2, 1)
            row, column = rng.integers(0, IMAGE_SIZE - len(part), 2)
            window = light[_window((column, row), len(part))]
            np.copyto(window, 20 + 0.4 * part, where=part > 0)
        return np.clip(light, 0, 255)[..., None] * rng.uniform(0.85, 1.15, 3).astype(np.float32)

    @cached_property
    def questions(self) -> list[Question]:
        """Return every question with a well-defined answer."""
        return list(_questions(self))


def _meet(one: Item, other: Item) -> bool:
    """Say whether the photographs of two items overlap."""
    pairs = zip(one.window, other.window, strict=True)
    return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pairs)


def _drawn(tag: Tag) -> np.ndarray:
    """Draw a tag, dark ink on white paper, float32 ``[size, size]``."""
    ink = Image.fromarray((255 * scans()[0][tag.scan]).astype(np.uint8))
    inner = tag.size - 2
    ink = ink.resize((inner, inner), Image.Resampling.BILINEAR)
    return 245 - np.pad(np.clip(1.3 * np.asarray(ink, np.float32), 0, 235), 1)


@dataclass(frozen=True, eq=False)
class SceneBatch:
    """Some scenes, drawn together."""

    items: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.items)

    def scenes(self) -> tuple[Scene, ...]:
        """Return the scenes."""
        return self.items

    def render(self) -> np.ndarray:
        """Draw the scenes, uint8 ``[B, IMAGE_SIZE, IMAGE_SIZE, 3]``."""
        return np.stack([scene.render() for scene in self.items])


def _questions(scene: Scene) -> Iterator[Question]:
    """Yield every question that has exactly one right answer."""
    garments = Counter(item.garment for item in scene.items)
    colors = Counter(item.color for item in scene.items)
    for index, item in enumerate(scene.items):
        if colors[item.color] == 1:
            yield Question("tinted", f"what is {item.color}", item.garment)
        if item.tag is not None:
            yield Question("owner", f"what has number {item.tag.digit}", item.garment)
        # Case: "the bag" would not say which.
        if garments[item.garment] > 1:
            continue
        yield Question("color", f"what color is the {item.garment}", item.color)
        place = _place(scene.centers[index])
        if place is not None:
            yield Question("where", f"where is the {item.garment}", place)
        if item.tag is not None:
            yield Question("tag", f"what number is on the {item.garment}", str(item.tag.digit))
        (others,) = np.nonzero(scene.contacts[index])
        if len(others) == 1 and scene.contacts[index, others[0]] >= CONTACT:
            other = scene.items[others[0]].garment
            yield Question("touch", f"what touches the {item.garment}", other)
    yield Question("count", "how many items", NUMBERS[len(scene.items)])
    for name in _present_and_one_absent(garments, GARMENTS):
        yield Question("count_garment", f"how many {name} items", NUMBERS[garments[name]])
    for name in _present_and_one_absent(colors, COLORS):
        yield Question("count_color", f"how many {name} items", NUMBERS[colors[name]])
    # Asked only if one color is ahead of all others.
    (first, most), *rest = colors.most_common(2)
    if not rest or rest[0][1] < most:
        yield Question("most", "most common color", first)


def _place(center: np.ndarray) -> str | None:
    """Return the quarter of the image that a point is in, unless it is near the middle."""
    off = center - IMAGE_SIZE / 2
    if np.abs(off).min() < MARGIN:
        return None
    return PLACES[2 * int(off[1] > 0) + int(off[0] > 0)]


def _present_and_one_absent(counts: Counter[str], names: tuple[str, ...]) -> list[str]:
    """Return the names that count, and one that does not, so that few answers are zero."""
    absent = [name for name in names if not counts[name]]
    # The total picks, so that no name is asked about more often when it is absent.
    return [*counts, *absent[counts.total() % len(absent) :][:1]] if absent else [*counts]
