"""Make the training targets of the reference model: descriptions of patches, packs of questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.reference.model import VISUAL_TOKENS, VOCABULARY
from deos_fx.reference.scenes import (
    BACKDROPS,
    COLORS,
    COLUMNS,
    GRID,
    ROWS,
    Question,
    SceneBatch,
)

__all__ = [
    "IGNORE",
    "LAYOUT",
    "PRESENCE",
    "SLOTS",
    "Asked",
    "Described",
    "Description",
    "Pack",
    "PackLayout",
    "Pictures",
    "Slots",
    "presence",
]

IGNORE = -100
PRESENCE = 10 + len(COLORS) + len(BACKDROPS)


class Asked(Protocol):
    """A scene, as far as a pack needs it."""

    @property
    def questions(self) -> Sequence[Question]:
        """Return every question with a well-defined answer."""
        ...


class Pictures(Protocol):
    """A batch of scenes of any task."""

    def __len__(self) -> int: ...

    def render(self) -> np.ndarray:
        """Draw the scenes, uint8 ``[B, IMAGE_SIZE, IMAGE_SIZE, 3]``."""
        ...

    def scenes(self) -> Sequence[Asked]:
        """Return the scenes with their questions."""
        ...


class Description(Protocol):
    """What every patch of a batch shows, as :class:`Described` says it for the reference task."""

    @property
    def filled(self) -> Tensor:
        """Flag the patches that an object is on, bool ``[B, VISUAL_TOKENS]``."""
        ...

    def to(self, device: torch.device) -> Description: ...

    def embed(self, words: Tensor) -> Tensor:
        """Sum the vectors of the words that describe each patch."""
        ...

    def loss(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Measure the distance of visual tokens from their descriptions."""
        ...

    def accuracy(self, tokens: Tensor, words: Tensor) -> dict[str, float]:
        """Compute fractions of tokens that resemble the right words most."""
        ...


class Slots(NamedTuple):
    """The questions of one kind in a pack: how many, and the words of each and of its answer."""

    number: int
    question: int
    answer: int


# More of the kinds that look something up, which are slow to learn. All questions of a kind have
# the same number of words, so all packs have the same layout.
SLOTS = {
    "at": Slots(2, 5, 1),
    "color": Slots(2, 5, 1),
    "where": Slots(2, 4, 2),
    "left_of": Slots(3, 6, 1),
    "count": Slots(1, 3, 1),
    "count_color": Slots(2, 4, 1),
    "scene": Slots(1, 3, 1),
    "most": Slots(1, 3, 1),
}
# Similarities of unit vectors span too small a range to be logits.
_TEMPERATURE = 0.125


def _words(*words: str) -> Tensor:
    return torch.tensor([VOCABULARY[word] for word in words])


_DIGIT_WORDS = _words(*map(str, range(10)))
_COLOR_WORDS = _words(*COLORS)
_BACKDROP_WORDS = _words(*BACKDROPS)
_PATCH_ROWS = _words(*ROWS).repeat_interleave(GRID // 3).repeat_interleave(GRID)
_PATCH_COLUMNS = _words(*COLUMNS).repeat_interleave(GRID // 3).repeat(GRID)


@dataclass(frozen=True, eq=False)
class Described:
    """The content of every patch of some pictures; all fields are ``[B, VISUAL_TOKENS]``.

    Attributes:
        digit: The digit, or ``IGNORE`` where there is none.
        color: Index of its color, or ``IGNORE`` where there is no digit.
        backdrop: Index of the photograph, or ``IGNORE`` where ink touches the patch.
    """

    digit: Tensor
    color: Tensor
    backdrop: Tensor

    @classmethod
    def of(cls, batch: SceneBatch) -> Described:
        """Describe the patches: a digit is on those with a fifth of its ink, or with the most."""
        shares = batch.shares()
        mine, patch = np.nonzero(shares >= np.minimum(0.2, shares.max(1, keepdims=True)))
        digit = np.full((len(batch), VISUAL_TOKENS), IGNORE)
        color = digit.copy()
        digit[batch.owner[mine], patch] = batch.digit[mine]
        color[batch.owner[mine], patch] = batch.color[mine]
        backdrop = np.repeat(batch.backdrop[:, None], VISUAL_TOKENS, 1)
        touching, patch = np.nonzero(shares > 0.02)
        backdrop[batch.owner[touching], patch] = IGNORE
        return cls(*map(torch.from_numpy, (digit, color, backdrop)))

    def to(self, device: torch.device) -> Described:
        """Return the same description on a device."""
        return Described(*(each.to(device) for each in (self.digit, self.color, self.backdrop)))

    @property
    def filled(self) -> Tensor:
        """Flag the patches that a digit is on, bool ``[B, VISUAL_TOKENS]``."""
        return self.digit != IGNORE

    def embed(self, words: Tensor) -> Tensor:
        """Sum the vectors of the words that describe each patch.

        Args:
            words: Word vectors, ``[vocabulary, width]``.

        Returns:
            ``[B, VISUAL_TOKENS, width]``.
        """
        place = words[_PATCH_ROWS] + words[_PATCH_COLUMNS]
        # Every patch has a place. What else is on it, if anything, is added.
        total = place.expand(len(self.digit), -1, -1).clone()
        for labels, names in self._groups():
            known = labels != IGNORE
            total[known] += words[names.to(labels.device)[labels[known]]]
        return total

    def loss(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Measure the distance of visual tokens from their descriptions.

        Args:
            tokens: Projected visual tokens, ``[B, VISUAL_TOKENS, width]``.
            words: Word vectors, ``[vocabulary, width]``.

        Returns:
            Scalar: the mean squared distance of patches with a digit, plus that of patches without
            ink, plus the cross-entropies of telling digits, colors and photographs apart.
        """
        # Patches touched by a little ink have neither a digit nor a backdrop and are left out.
        distance = (tokens - self.embed(words)).square().sum(-1)
        loss = distance[self.backdrop != IGNORE].mean() + distance[self.digit != IGNORE].mean()
        for labels, names in self._groups():
            logits = tokens @ words[names].T / _TEMPERATURE
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, words: Tensor) -> dict[str, float]:
        """Compute the fraction of tokens that resemble the right digit, color and photograph most.

        Args:
            tokens: As for :meth:`loss`.
            words: As for :meth:`loss`.
        """
        right = {}
        for name, (labels, names) in zip(
            ("digits", "colors", "backdrops"), self._groups(), strict=True
        ):
            known = labels != IGNORE
            guess = (tokens[known] @ words[names].T).argmax(-1)
            right[name] = (guess == labels[known]).float().mean().item()
        return right

    def _groups(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (self.digit, _DIGIT_WORDS),
            (self.color, _COLOR_WORDS),
            (self.backdrop, _BACKDROP_WORDS),
        ]


def presence(batch: SceneBatch) -> Tensor:
    """Flag the digits, colors and photograph of each picture, 0 or 1, float ``[B, PRESENCE]``."""
    there = np.zeros((len(batch), PRESENCE), np.float32)
    there[batch.owner, batch.digit] = 1
    there[batch.owner, 10 + batch.color] = 1
    there[np.arange(len(batch)), 10 + len(COLORS) + batch.backdrop] = 1
    return torch.from_numpy(there)


class PackLayout:
    """Positions and attention of a pack; the same for every pack.

    Args:
        slots: Kind of question -> its slots.
        vocabulary: Word -> token id.

    Attributes:
        slots: As given.
        vocabulary: As given.
        kind: Index into the kinds of ``slots`` of every question, ``[Q]``.
        slot: Number of the question that a word belongs to, ``[T]``.
        position: Place of a word in its question, ``[T]``.
    """

    def __init__(
        self, slots: Mapping[str, Slots] = SLOTS, vocabulary: Mapping[str, int] = VOCABULARY
    ) -> None:
        self.slots, self.vocabulary = slots, vocabulary
        order = [
            (kind, each) for kind, each in enumerate(slots.values()) for _ in range(each.number)
        ]
        lengths = torch.tensor([each.question + each.answer for _, each in order])
        self.kind = torch.tensor([kind for kind, _ in order])
        self.slot = torch.arange(len(order)).repeat_interleave(lengths)
        self.position = torch.cat([torch.arange(length) for length in lengths])

    def mask(self, visual: int) -> Tensor:
        """Make the additive attention mask: words see the picture and earlier words of a question.

        Args:
            visual: Number V of visual tokens.

        Returns:
            ``[1, 1, S, S]``, with S = 1 + V + T.
        """
        # The picture and the start of the prompt have slot -1, which every word sees.
        picture = torch.full((1 + visual,), -1)
        slot = torch.cat([picture, self.slot])
        seen = (slot == slot[:, None]) | (slot == -1)
        blocked = ~seen.tril()
        mask = torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo(torch.float32).min)
        return mask[None, None]

    @torch.no_grad()
    def accuracy(self, logits: Tensor, pack: Pack) -> dict[str, float]:
        """Compute the fraction of questions answered entirely right, by kind.

        Args:
            logits: Logits for every word that has a target, ``[A, vocabulary]``.
            pack: The questions.
        """
        # A question is failed if any word of its answer is wrong, and posed if it has a target.
        targets = pack.targets.cpu()
        asked = targets != IGNORE
        wrong = torch.zeros(targets.shape)
        wrong[asked] = (logits.argmax(-1).cpu() != targets[asked]).float()
        empty = torch.zeros(len(targets), len(self.kind))
        failed = empty.index_add(1, self.slot, wrong) > 0
        posed = empty.index_add(1, self.slot, asked.float()) > 0
        right = {}
        for index, kind in enumerate(self.slots):
            these = posed & (self.kind == index)
            if these.any():
                right[kind] = 1 - failed[these].float().mean().item()
        return right

    def fill(
        self, questions: Sequence[Question], rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Return words and targets of one picture's pack; what cannot be asked stays empty."""
        words: list[int] = []
        targets: list[int] = []
        for kind, slots in self.slots.items():
            length = slots.question + slots.answer
            choices = [question for question in questions if question.kind == kind]
            # Case: no such question about this scene. The slots get padding without targets.
            if not choices:
                words += [self.vocabulary["<pad>"]] * length * slots.number
                targets += [IGNORE] * length * slots.number
                continue
            # With fewer questions than slots, some are repeated.
            for pick in rng.permutation(max(slots.number, len(choices)))[: slots.number]:
                question = choices[pick % len(choices)]
                answer = [self.vocabulary[word] for word in question.answer.split()]
                words += [self.vocabulary[word] for word in question.text.split()] + answer
                # Targets are one ahead: the question's last word predicts the first of the answer.
                targets += [IGNORE] * (slots.question - 1) + answer + [self.vocabulary["<eos>"]]
        return words, targets


LAYOUT = PackLayout()


@dataclass(frozen=True, eq=False)
class Pack:
    """Questions about each picture of a batch, side by side.

    Attributes:
        words: Questions with their answers, ``[B, T]``.
        targets: The next word where it belongs to an answer or ends it, else ``IGNORE``,
            ``[B, T]``.
    """

    words: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Pictures, rng: np.random.Generator, layout: PackLayout = LAYOUT) -> Pack:
        """Pick questions for the slots; a slot whose kind cannot be asked stays empty."""
        rows = [layout.fill(scene.questions, rng) for scene in batch.scenes()]
        return cls(*torch.tensor(rows).unbind(1))

    def to(self, device: torch.device) -> Pack:
        """Return the same pack on a device."""
        return Pack(self.words.to(device), self.targets.to(device))
