"""Make the training targets of the garment model: descriptions of patches, packs of questions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.reference.lessons import IGNORE, PackLayout, Slots
from deos_fx.reference.model import SPECIAL, VISUAL_TOKENS
from deos_fx.reference.scenes import GRID, NUMBERS, PATCH_SIZE
from deos_fx.reference.student import Task

from .photographs import GARMENTS, Wardrobe
from .sampling import sample_crowds, sample_scenes
from .scenes import COLORS, CONTACT, DIGITS, Scene, SceneBatch

__all__ = ["VOCABULARY", "Described", "garment_task"]

_FUNCTION_WORDS = (
    "top bottom left right what color is the where number on has touches how many items most common"
).split()
VOCABULARY = {
    word: index
    for index, word in enumerate(
        (*SPECIAL, *map(str, DIGITS), *COLORS, *GARMENTS, *NUMBERS, *_FUNCTION_WORDS)
    )
}

# Questions of a pack, as in the reference task.
SLOTS = {
    "color": Slots(2, 5, 1),
    "where": Slots(2, 4, 2),
    "tag": Slots(2, 6, 1),
    "owner": Slots(1, 4, 1),
    "tinted": Slots(1, 3, 1),
    "touch": Slots(2, 4, 1),
    "count": Slots(1, 3, 1),
    "count_garment": Slots(2, 4, 1),
    "count_color": Slots(2, 4, 1),
    "most": Slots(1, 3, 1),
}
PRESENCE = len(GARMENTS) + len(COLORS) + len(DIGITS)

# An item is on a patch that it covers to this share, or on the one that it covers most.
_ON = 0.25
# A garment that touches the one on a patch is named too if it covers this share.
_BESIDE = 0.12
# A patch with less than this share of garments is empty.
_EMPTY = 0.03
# Similarities of unit vectors span too small a range to be logits.
_TEMPERATURE = 0.125


def _words(*words: str) -> Tensor:
    return torch.tensor([VOCABULARY[word] for word in words])


_GARMENT_WORDS = _words(*GARMENTS)
_COLOR_WORDS = _words(*COLORS)
_DIGIT_WORDS = _words(*map(str, DIGITS))
_PATCH_ROWS = _words("top", "bottom").repeat_interleave(GRID // 2).repeat_interleave(GRID)
_PATCH_COLUMNS = _words("left", "right").repeat_interleave(GRID // 2).repeat(GRID)


@dataclass(frozen=True, eq=False)
class Described:
    """The content of every patch of some pictures; all fields are ``[B, VISUAL_TOKENS]``.

    Attributes:
        garment: Index into ``GARMENTS`` of the garment on it, or ``IGNORE`` where there is none.
        color: Index of its color, or ``IGNORE``.
        beside: Index of a garment on the same patch that touches it, or ``IGNORE``.
        digit: Index into ``DIGITS`` of the tag on it, or ``IGNORE``.
        heart: Whether it is the one patch that stands for its item when items are counted.
        empty: Whether no garment is on it.
    """

    garment: Tensor
    color: Tensor
    beside: Tensor
    digit: Tensor
    heart: Tensor
    empty: Tensor

    @classmethod
    def of(cls, batch: SceneBatch) -> Described:
        """Describe the patches of every scene."""
        described = [_describe(scene) for scene in batch.scenes()]
        return cls(*(torch.from_numpy(np.stack(field)) for field in zip(*described, strict=True)))

    @property
    def filled(self) -> Tensor:
        """Flag the patches that a garment is on, bool ``[B, VISUAL_TOKENS]``."""
        return self.garment != IGNORE

    def to(self, device: torch.device) -> Described:
        """Return the same description on a device."""
        return Described(*(getattr(self, field.name).to(device) for field in fields(self)))

    def embed(self, words: Tensor) -> Tensor:
        """Sum the vectors of the words that describe each patch.

        Args:
            words: Word vectors, ``[vocabulary, width]``.

        Returns:
            ``[B, VISUAL_TOKENS, width]``.
        """
        place = words[_PATCH_ROWS] + words[_PATCH_COLUMNS]
        # Every patch has a place. What else is on it, if anything, is added.
        total = place.expand(len(self.garment), -1, -1).clone()
        for labels, names in (*self._groups(), (self.beside, _GARMENT_WORDS)):
            known = labels != IGNORE
            total[known] += words[names.to(labels.device)[labels[known]]]
        return total + self.heart[..., None] * words[VOCABULARY["items"]]

    def loss(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Measure the distance of visual tokens from their descriptions.

        Args:
            tokens: Projected visual tokens, ``[B, VISUAL_TOKENS, width]``.
            words: Word vectors, ``[vocabulary, width]``.

        Returns:
            Scalar: the mean squared distances of patches with a garment, of empty ones, of hearts
            and of those with a tag or a second garment, plus the cross-entropies of telling
            garments, colors and digits apart.
        """
        # Patches touched by the edge of a garment are left out, except that they are no hearts.
        distance = (tokens - self.embed(words)).square().sum(-1)
        groups = [self.filled, self.empty, self.heart > 0]
        groups += [self.digit != IGNORE, self.beside != IGNORE]
        loss = torch.stack([_mean(distance, group) for group in groups]).sum()
        edge = ~self.filled & ~self.empty
        loss = loss + _mean((tokens @ words[VOCABULARY["items"]]).square(), edge)
        for labels, names in self._groups():
            logits = tokens @ words[names].T / _TEMPERATURE
            wrong = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            loss = loss + wrong / (labels != IGNORE).sum().clamp(min=1)
        return loss

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, words: Tensor) -> dict[str, float]:
        """Compute the fraction of tokens that resemble the right words most.

        Args:
            tokens: As for :meth:`loss`.
            words: As for :meth:`loss`.
        """
        right = {}
        for name, (labels, names) in zip(
            ("garments", "colors", "digits"), self._groups(), strict=True
        ):
            known = labels != IGNORE
            guess = (tokens[known] @ words[names].T).argmax(-1)
            right[name] = (guess == labels[known]).float().mean().item()
        marked = tokens @ words[VOCABULARY["items"]]
        right["hearts"] = (marked[self.heart > 0] > 0.5).float().mean().item()
        off = (marked * (self.heart == 0)).sum(1) - ((1 - marked) * self.heart).sum(1)
        right["off"] = off.abs().mean().item()
        return right

    def _groups(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (self.garment, _GARMENT_WORDS),
            (self.color, _COLOR_WORDS),
            (self.digit, _DIGIT_WORDS),
        ]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Average values where a flag is set; 0 where none is."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _describe(scene: Scene) -> tuple[np.ndarray, ...]:
    """Return the fields of :class:`Described` for one scene, ``[VISUAL_TOKENS]`` each."""
    coverage = scene.coverage
    kinds = np.array([GARMENTS.index(item.garment) for item in scene.items])
    tints = np.array([COLORS.index(item.color) for item in scene.items])
    patches = np.arange(VISUAL_TOKENS)
    # 1. The item on each patch: the one that covers most of it.
    item = coverage.argmax(0)
    on = coverage[item, patches] >= _ON
    best = coverage.argmax(1)
    item[best], on[best] = np.arange(len(kinds)), True
    garment, color = np.where(on, kinds[item], IGNORE), np.where(on, tints[item], IGNORE)
    # 2. The other garment, where two that touch meet.
    meet = (scene.contacts >= CONTACT)[item] & (coverage.T >= _BESIDE) & on[:, None]
    other = np.where(meet, coverage.T, 0).argmax(1)
    beside = np.where(meet.any(1) & (kinds[other] != garment), kinds[other], IGNORE)
    # 3. The heart of each item: of its patches the one nearest to its center.
    centers = (np.stack([patches % GRID, patches // GRID], 1) + 0.5) * PATCH_SIZE
    away = np.linalg.norm(centers[None] - scene.centers[:, None], axis=-1)
    away[(item != np.arange(len(kinds))[:, None]) | ~on] = np.inf
    heart = np.zeros(VISUAL_TOKENS, np.float32)
    heart[away.argmin(1)] = 1
    # 4. The tag on each patch, if a quarter of it is, or most of it.
    digit = np.full(VISUAL_TOKENS, IGNORE)
    for thing in scene.items:
        if thing.tag is not None:
            share = _shares(thing.tag.window)
            digit[share >= min(0.24, share.max())] = DIGITS.index(thing.tag.digit)
    return garment, color, beside, digit, heart, coverage.sum(0) < _EMPTY


def _shares(window: tuple[slice, slice]) -> np.ndarray:
    """Return the share of a window of pixels that is in each patch, ``[VISUAL_TOKENS]``."""
    edges = np.arange(GRID + 1) * PATCH_SIZE
    parts = []
    for span in window:
        inside = np.minimum(span.stop, edges[1:]) - np.maximum(span.start, edges[:-1])
        parts.append(np.maximum(inside, 0) / (span.stop - span.start))
    rows, columns = parts
    return (rows[:, None] * columns).ravel()


def _present(batch: SceneBatch) -> Tensor:
    """Flag the garments, colors and digits of each picture, 0 or 1, float ``[B, PRESENCE]``."""
    names = (*GARMENTS, *COLORS, *DIGITS)
    there = torch.zeros(len(batch), PRESENCE)
    for row, scene in zip(there, batch.scenes(), strict=True):
        for item in scene.items:
            row[names.index(item.garment)] = row[names.index(item.color)] = 1
            if item.tag is not None:
                row[names.index(item.tag.digit)] = 1
    return there


def _crowd(count: int, rng: np.random.Generator, progress: float, wardrobe: Wardrobe) -> SceneBatch:
    """Sample pictures full of garments first, scenes later."""
    # Tags are aligned for the first tenth of the stage, then less and less during a quarter.
    difficulty = min(1.0, max(0.0, (progress - 0.1) / 0.25))
    if progress > 0.5 and rng.random() < 0.5:
        return sample_scenes(count, "train", rng, wardrobe=wardrobe)
    return sample_crowds(count, rng, difficulty, wardrobe=wardrobe)


def garment_task(wardrobe: Wardrobe) -> Task:
    """Return the task that the garment model learns."""
    return Task(
        PackLayout(SLOTS, VOCABULARY),
        PRESENCE,
        partial(sample_scenes, wardrobe=wardrobe),
        partial(_crowd, wardrobe=wardrobe),
        Described.of,
        _present,
        shown=64,
    )
