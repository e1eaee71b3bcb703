"""Sample scenes, and questions about them."""

from __future__ import annotations

from functools import cache

import numpy as np

from deos_fx.reference.scenes import (
    BACKDROPS,
    CELL_SIZE,
    COLORS,
    CROPS_PER_BACKDROP,
    KINDS,
    PATCH_SIZE,
    SPLITS,
    Example,
    Scene,
    SceneBatch,
    Split,
    scans,
)

__all__ = ["make_examples", "make_scenes", "pools", "sample_mosaics", "sample_scenes"]

# Scenes are sampled in blocks of this size, so that the first scenes of a longer list are the
# scenes of a shorter one.
_BLOCK = 256

# The scans of each split.
_SPLIT_ENDS = {"train": (0, 1397), "validation": (1397, 1547), "test": (1547, 1797)}


def make_scenes(count: int, split: Split = "train", seed: int = 0) -> list[Scene]:
    """Compose scenes; the same arguments always give the same scenes.

    Args:
        count: Number of scenes.
        split: The split of scans and of parts of the photographs to use.
        seed: Seed of the scenes.

    Returns:
        The scenes. A longer list starts with the scenes of a shorter one.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += sample_scenes(_BLOCK, split, rng).scenes()
    return scenes[:count]


def make_examples(count: int, split: Split = "train", seed: int = 0) -> list[Example]:
    """Compose questions about scenes, one question per scene, kinds in turn.

    Args:
        count: Number of questions.
        split: As for :func:`make_scenes`.
        seed: As for :func:`make_scenes`.

    Returns:
        The examples. The numbers of questions of two kinds differ by at most one.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    # Two kinds cannot be asked about every scene; twice as many scenes leave room to skip some.
    spare = iter(make_scenes(2 * count + _BLOCK, split, seed))
    examples = []
    for n in range(count):
        kind = KINDS[n % len(KINDS)]
        for scene in spare:
            questions = [question for question in scene.questions if question.kind == kind]
            if questions:
                examples.append(Example(scene, questions[rng.integers(len(questions))]))
                break
    return examples


def sample_scenes(
    count: int,
    split: Split,
    rng: np.random.Generator,
    objects: tuple[int, int] = (3, 7),
    difficulty: float = 1.0,
) -> SceneBatch:
    """Sample scenes.

    Args:
        count: Number of scenes B.
        split: The split of scans and of parts of the photographs to use.
        rng: Source of randomness.
        objects: Fewest and most objects of a scene.
        difficulty: 1 for real scenes. Towards 0, for the start of a training run, digits are
            smaller and less shifted, rotated and stretched.

    Returns:
        The batch.
    """
    # For each of 9 possible objects of a scene, whether it is there: the first ones are.
    present = rng.integers(objects[0], objects[1] + 1, count)[:, None] > np.arange(9)
    owner, _ = np.nonzero(present)
    # Distinct cells in reading order; absent objects get cell 9 and sort to the end.
    cell = rng.random((count, 9)).argsort(1)
    cell[~present] = 9
    cell.sort(1)
    # Distinct digits in every scene.
    digit = rng.random((count, 10)).argsort(1)[:, :9][present]
    # Colors of a scene are drawn from its own uneven palette, so that one color often prevails.
    palette = rng.dirichlet(np.ones(len(COLORS)), count).cumsum(1)
    color = (rng.random((count, 9, 1)) > palette[:, None, :-1]).sum(2)[present]
    cell = cell[present]
    # A center is one of the two middle patches of its cell in both directions.
    corner = np.stack([cell % 3, cell // 3], 1) * CELL_SIZE
    center = corner + (rng.integers(1, 3, (len(cell), 2)) + 0.5) * PATCH_SIZE
    return _compose(count, split, rng, difficulty, owner, cell, digit, color, center)


def sample_mosaics(
    count: int, split: Split, rng: np.random.Generator, difficulty: float = 1.0
) -> SceneBatch:
    """Sample images full of digits, without cells or questions, to train a vision tower.

    Digits stand on every third patch in both directions, the grid starting at a random patch.

    Args:
        count: Number of images B.
        split: As for :func:`sample_scenes`.
        rng: As for :func:`sample_scenes`.
        difficulty: As for :func:`sample_scenes`.

    Returns:
        The batch, with -1 for every cell.
    """
    owner = np.repeat(np.arange(count), 16)
    start = rng.integers(0, 3, (count, 2))[owner]
    place = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(-1, 2)
    center = (np.tile(place * 3, (count, 1)) + start + 0.5) * PATCH_SIZE
    digit = rng.integers(0, 10, len(owner))
    color = rng.integers(0, len(COLORS), len(owner))
    cell = np.full(len(owner), -1)
    return _compose(count, split, rng, difficulty, owner, cell, digit, color, center)


def _compose(
    count: int,
    split: Split,
    rng: np.random.Generator,
    difficulty: float,
    owner: np.ndarray,
    cell: np.ndarray,
    digit: np.ndarray,
    color: np.ndarray,
    center: np.ndarray,
) -> SceneBatch:
    """Sample everything that does not depend on the layout, and make the batch."""
    scans_of = pools(split)
    sizes = np.array([len(pool) for pool in scans_of])
    picks = rng.integers(0, sizes[digit])
    scan = np.array([scans_of[d][pick] for d, pick in zip(digit, picks, strict=True)])
    shift = 1 + 2 * difficulty
    # Training distorts its scans more than the other splits, since there are only 1,397 of them.
    bend = difficulty * (1.5 if split == "train" else 1.0)
    return SceneBatch(
        backdrop=rng.integers(0, len(BACKDROPS), count),
        crop=rng.integers(0, CROPS_PER_BACKDROP, count),
        light=rng.uniform(0.2, 0.45, count),
        owner=owner,
        cell=cell,
        digit=digit,
        color=color,
        scan=scan,
        center=center + rng.uniform(-shift, shift, center.shape),
        size=rng.uniform(12, 14 + 6 * difficulty, len(owner)),
        angle=rng.uniform(-0.2, 0.2, len(owner)) * bend,
        stretch=rng.uniform(-0.1, 0.1, len(owner)) * bend,
        split=split,
    )


@cache
def pools(split: Split) -> list[np.ndarray]:
    """Return the scans of the split that show each digit."""
    start, end = _SPLIT_ENDS[split]
    labels = scans()[1][start:end]
    return [start + np.flatnonzero(labels == digit) for digit in range(10)]
