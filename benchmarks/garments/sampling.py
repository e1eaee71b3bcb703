"""Sample scenes, and questions about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from deos_fx.reference.sampling import pools
from deos_fx.reference.scenes import IMAGE_SIZE, PATCH_SIZE, SPLITS, Example, Split

from .photographs import GARMENTS, Wardrobe, read_wardrobe
from .scenes import COLORS, DIGITS, KINDS, Item, Scene, SceneBatch, Tag

__all__ = ["make_examples", "make_scenes", "sample_crowds", "sample_scenes"]

# Sides of photographs in pixels, ends inclusive.
_SCALES = ((22, 26), (28, 34), (40, 46))
# Smallest garment that can have a tag.
_TAGGED = 28
# Largest share of the smaller of two photographs that the other may hide.
_OVERLAP = 0.35
# Smallest distance of the centers of two photographs, in pixels.
_APART = 15
# Smallest share of a silhouette that has to be seen.
_SEEN = 0.7


def make_scenes(
    count: int, split: Split = "train", seed: int = 0, *, data: str | Path
) -> list[Scene]:
    """Compose scenes; the same arguments always give the same scenes.

    Args:
        count: Number of scenes.
        split: The split of photographs and scans to use.
        seed: Seed of the scenes.
        data: The folder with Fashion-MNIST, as for :func:`read_wardrobe`.

    Returns:
        The scenes. A longer list starts with the scenes of a shorter one.

    Raises:
        ValueError: As :func:`read_wardrobe`.
    """
    return list(islice(_scenes(read_wardrobe(data), split, seed), count))


def make_examples(
    count: int, split: Split = "train", seed: int = 0, *, data: str | Path
) -> list[Example]:
    """Compose questions about scenes, one question per scene, kinds in turn.

    Args:
        count: Number of questions.
        split: As for :func:`make_scenes`.
        seed: As for :func:`make_scenes`.
        data: As for :func:`make_scenes`.

    Returns:
        The examples. The numbers of questions of two kinds differ by at most one.

    Raises:
        ValueError: As :func:`read_wardrobe`.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    scenes = _scenes(read_wardrobe(data), split, seed)
    examples = []
    for n in range(count):
        kind = KINDS[n % len(KINDS)]
        # Some kinds cannot be asked about every scene.
        for scene in scenes:
            questions = [question for question in scene.questions if question.kind == kind]
            if questions:
                examples.append(Example(scene, questions[rng.integers(len(questions))]))
                break
    return examples


def sample_scenes(
    count: int, split: Split, rng: np.random.Generator, *, wardrobe: Wardrobe
) -> SceneBatch:
    """Sample scenes of three to six garments.

    Args:
        count: Number of scenes.
        split: The split of photographs and scans to use.
        rng: Source of randomness.
        wardrobe: The photographs.
    """
    return SceneBatch(tuple(_scene(wardrobe, split, rng) for _ in range(count)))


def sample_crowds(
    count: int, rng: np.random.Generator, difficulty: float = 1.0, *, wardrobe: Wardrobe
) -> SceneBatch:
    """Sample training images full of garments, spread evenly, to train a vision tower.

    Args:
        count: Number of images.
        rng: Source of randomness.
        difficulty: 1 for tags at any place. Towards 0, they are nearer to centers of patches.
        wardrobe: The photographs.
    """
    crowds = (
        _scene(wardrobe, "train", rng, (8, 11), clustered=False, tags=(4, 5), difficulty=difficulty)
        for _ in range(count)
    )
    return SceneBatch(tuple(crowds))


def _scenes(wardrobe: Wardrobe, split: Split, seed: int) -> Iterator[Scene]:
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    while True:
        yield _scene(wardrobe, split, rng)


def _scene(
    wardrobe: Wardrobe,
    split: Split,
    rng: np.random.Generator,
    objects: tuple[int, int] = (3, 6),
    clustered: bool = True,
    tags: tuple[int, int] = (1, 3),
    difficulty: float = 1.0,
) -> Scene:
    """Sample one scene."""
    while True:
        count = int(rng.integers(objects[0], objects[1] + 1))
        places = _places(count, rng, clustered)
        garments, colors = _garments(len(places), rng), _colors(len(places), rng)
        items = []
        for garment, color, (x, y, size) in zip(garments, colors, places, strict=True):
            pool = wardrobe.photographs[split][garment]
            photograph = int(rng.integers(len(pool)))
            items.append(Item(GARMENTS[garment], COLORS[color], photograph, (x, y), size))
        scene = Scene(tuple(items), wardrobe, split, int(rng.integers(2**31)))
        # Before tags, because they take longer, and after, because a tag may hide a garment.
        if len(items) >= objects[0] and _all_seen(scene):
            scene = _tagged(scene, int(rng.integers(tags[0], tags[1] + 1)), rng, difficulty)
            if _all_seen(scene):
                return scene


def _all_seen(scene: Scene) -> bool:
    seen = np.bincount(scene.owners.ravel() + 1, minlength=len(scene.items) + 1)[1:]
    whole = np.array([np.count_nonzero(opacity > 0.5) for opacity in scene.opacities])
    return bool((seen >= np.maximum(_SEEN * whole, 40)).all())


def _places(count: int, rng: np.random.Generator, clustered: bool) -> list[tuple[int, int, int]]:
    """Sample places of photographs that hide little of each other: upper left x, y and side.

    Where nothing fits after some attempts, a photograph is left out.
    """
    hubs = rng.uniform(30, IMAGE_SIZE - 30, (1 + (count > 4), 2))
    found: list[tuple[int, int, int]] = []
    for _ in range(count):
        low, high = _SCALES[rng.integers(len(_SCALES))]
        for attempt in range(40):
            size = int(rng.integers(low, high + 1))
            # Case: near the center of a cluster.
            if clustered and attempt < 30:
                x, y = hubs[rng.integers(len(hubs))] + rng.normal(0, 18, 2) - size / 2
            # Case: anywhere.
            else:
                x, y = rng.uniform(0, IMAGE_SIZE - size, 2)
            x, y = (int(min(max(0, end), IMAGE_SIZE - size)) for end in (x, y))
            if all(_fits((x, y, size), other) for other in found):
                found.append((x, y, size))
                break
    return found


def _fits(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    (x, y, size), (u, v, side) = one, other
    width = min(x + size, u + side) - max(x, u)
    height = min(y + size, v + side) - max(y, v)
    if width <= 0 or height <= 0:
        return True
    distance = np.hypot(x + size / 2 - u - side / 2, y + size / 2 - v - side / 2)
    return bool(width * height <= _OVERLAP * min(size, side) ** 2 and distance >= _APART)


def _garments(count: int, rng: np.random.Generator) -> list[int]:
    """Sample indices into ``GARMENTS``: mostly new ones, some as an earlier one."""
    new = list(rng.permutation(len(GARMENTS)))
    found: list[int] = []
    for _ in range(count):
        again = found and (not new or rng.random() < 0.3)
        found.append(int(found[rng.integers(len(found))] if again else new.pop()))
    return [found[index] for index in rng.permutation(count)]


def _colors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample indices into ``COLORS`` from an uneven palette, so that one color often prevails."""
    return rng.choice(len(COLORS), count, p=rng.dirichlet(np.ones(len(COLORS))))


def _tagged(scene: Scene, count: int, rng: np.random.Generator, difficulty: float) -> Scene:
    """Put tags with different digits on garments that are large enough and have the room."""
    items = list(scene.items)
    digits = iter(rng.permutation(DIGITS))
    candidates = [index for index, item in enumerate(items) if item.size >= _TAGGED]
    used: list[tuple[int, int]] = []
    for index in rng.permutation(candidates)[:count] if candidates else ():
        size = int(rng.integers(12, 16))
        corner = _room(scene.owners == index, size, rng, difficulty)
        apart = corner and all(max(abs(corner[0] - x), abs(corner[1] - y)) > 18 for x, y in used)
        if corner and apart:
            used.append(corner)
            digit = int(next(digits))
            scan = int(rng.choice(pools(scene.split)[digit]))
            items[index] = replace(items[index], tag=Tag(digit, scan, corner, size))
    return replace(scene, items=tuple(items))


def _room(
    mine: np.ndarray, size: int, rng: np.random.Generator, difficulty: float
) -> tuple[int, int] | None:
    """Find a place for a tag where little but its garment is hidden: upper left x and y."""
    rows, columns = np.nonzero(mine)
    best, found = 0.5, None
    for pick in rng.integers(0, len(rows), 8):
        center = np.array([columns[pick], rows[pick]]) + 0.5
        snapped = (center // PATCH_SIZE + 0.5) * PATCH_SIZE
        corner = np.floor(snapped + difficulty * (center - snapped) - size / 2).astype(int)
        x, y = (int(end) for end in np.clip(corner, 0, IMAGE_SIZE - size))
        share = np.count_nonzero(mine[y : y + size, x : x + size]) / size**2
        if share > best:
            best, found = share, (x, y)
    return found
