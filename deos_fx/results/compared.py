"""Record methods that answered the same questions, with paired intervals of their accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

import numpy as np

from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy
from deos_fx.policy.shares import write_share

__all__ = [
    "Compared",
    "Difference",
    "Row",
    "Run",
    "bootstrap_means",
    "kept_at",
    "options_in_words",
]

RESAMPLES = 10_000
# Resamples that are drawn at a time, so that many questions do not fill the memory.
_AT_ONCE = 500


@dataclass(frozen=True)
class Run:
    """One run of a method over the test questions: with one seed, where something is random.

    Attributes:
        answers: Its answers, in the order of the questions.
        scores: The score of each answer, from 0 to 1; empty if the questions have no answers.
        cost: Cost of the first prompt.
        milliseconds: Measured time of a prefill of that prompt.
        policy: The policy; None where the model is not reduced by one.
        seed: The seed.
        values: Options of a preset.
        evaluations: Losses that were computed to find these.
        peak_bytes: What the prefill held at most, beside the model; None if it was not measured.
    """

    answers: Sequence[str] = field(repr=False)
    scores: Sequence[float] = field(repr=False)
    cost: Cost
    milliseconds: float
    policy: Policy | None = None
    seed: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """A method, with a run for each seed.

    Attributes:
        name: Its name.
        group: ``unreduced``, ``policy``, ``preset`` or ``input`` (less of the image goes in).
        runs: Its runs; empty if it could not be run.
        reason: Why not.
    """

    name: str
    group: str
    runs: Sequence[Run]
    reason: str = ""

    @property
    def scores(self) -> np.ndarray[Any, Any]:
        """Return the scores [runs, questions]."""
        return np.array([run.scores for run in self.runs], dtype=float)

    @property
    def visual_tokens(self) -> float:
        """Return the visual tokens of a decoder layer, mean over layers and runs."""
        return mean([run.cost.visual_tokens for run in self.runs])

    @property
    def flops(self) -> float:
        """Return the FLOPs of a prefill, mean over runs."""
        return mean([run.cost.flops for run in self.runs])

    @property
    def kv_bytes(self) -> float:
        """Return the bytes of the cache after it, mean over runs."""
        return mean([run.cost.kv_bytes for run in self.runs])

    @property
    def milliseconds(self) -> float:
        """Return the measured time of a prefill, mean over runs."""
        return mean([run.milliseconds for run in self.runs])

    @property
    def peak_bytes(self) -> float | None:
        """Return the measured memory of a prefill, mean over runs; None if there is none."""
        found = [run.peak_bytes for run in self.runs if run.peak_bytes is not None]
        return mean(found) if len(found) == len(self.runs) else None


@dataclass(frozen=True)
class Difference:
    """A mean, or a difference of two, with its 95 % interval.

    It is that of the resamples, and the exact one of a share where these cannot differ.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """Methods compared on the same questions.

    Attributes:
        rows: The methods; the first is the unreduced model.
        kinds: Kind of each question; empty texts if there are none.
        limit: Visual tokens that the budget allows in a prompt, mean over the decoder layers.
        tokens_per_image: Visual tokens of the first image of the first prompt.
        settings: Versions and settings.
    """

    rows: Sequence[Row]
    kinds: Sequence[str] = field(repr=False)
    limit: float
    tokens_per_image: int
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def left_out(self) -> list[Row]:
        """Return the methods that could not be run."""
        return [row for row in self.rows if not row.runs]

    @property
    def questions(self) -> int:
        """Return the number of test questions."""
        return len(self.kinds)

    @property
    def answered(self) -> bool:
        """Return whether the questions have answers, so that these were scored."""
        return bool(self.unreduced.runs[0].scores)

    @property
    def kind_names(self) -> list[str]:
        """Return the kinds of questions, in the order of their first question."""
        return [kind for kind in dict.fromkeys(self.kinds) if kind]

    @cached_property
    def measured(self) -> list[Row]:
        """Return the methods that were run: unreduced first, then by accuracy, if there is one."""
        unreduced, *others = [row for row in self.rows if row.runs]
        if len(unreduced.runs[0].scores):
            others.sort(key=lambda row: -float(row.scores.mean()))
        return [unreduced, *others]

    @property
    def unreduced(self) -> Row:
        """Return the unreduced model."""
        return self.measured[0]

    @property
    def best(self) -> Row | None:
        """Return the most accurate method that reduces, if any was run."""
        reduced = [row for row in self.measured[1:] if row.group != "input"]
        return reduced[0] if reduced else None

    def row(self, name: str) -> Row:
        """Return the method of a name."""
        return next(row for row in self.rows if row.name == name)

    def agreement(self, row: Row) -> float:
        """Return the share of questions that a method answers as the unreduced model does."""
        (whole,) = self.unreduced.runs
        same = [
            ours == theirs
            for run in row.runs
            for ours, theirs in zip(run.answers, whole.answers, strict=True)
        ]
        return mean(same)

    def accuracy(self, row: Row, kind: str = "") -> Difference:
        """Return the mean score of a method, on all questions or those of a kind."""
        scores = self._scores(row, kind)
        found = _difference(float(scores.mean()), self._means(kind)[:, self._column(row)])
        # All questions are answered alike, right (1) or wrong (0).
        if found.low == found.high and found.mean in (0, 1):
            least = _least_share(scores.shape[1])
            return Difference(1, least, 1) if found.mean else Difference(0, 0, 1 - least)
        return found

    def against(self, row: Row, other: Row, kind: str = "") -> Difference:
        """Return how much better a method is than another on the same questions (paired)."""
        means = self._means(kind)
        ahead = float(self._scores(row, kind).mean() - self._scores(other, kind).mean())
        found = _difference(ahead, means[:, self._column(row)] - means[:, self._column(other)])
        # All questions tell as much: that both do as well, or that one does better (1, -1).
        if found.low == found.high and ahead in (-1, 0, 1) and row is not other:
            least = _least_share(int(self._asked(kind).sum()))
            low, high = (least - 1, 1 - least) if not ahead else (2 * least - 1, 1)
            return Difference(ahead, low, high) if ahead >= 0 else Difference(ahead, -high, -low)
        return found

    def _column(self, row: Row) -> int:
        return next(i for i, known in enumerate(self.measured) if known is row)

    def _scores(self, row: Row, kind: str) -> np.ndarray[Any, Any]:
        return row.scores[:, self._asked(kind)]

    def _asked(self, kind: str) -> np.ndarray[Any, Any]:
        return np.array([not kind or own == kind for own in self.kinds])

    @cached_property
    def _known_means(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}

    def _means(self, kind: str) -> np.ndarray[Any, Any]:
        """Return the resampled means [resamples, methods]."""
        if kind not in self._known_means:
            scores = [self._scores(row, kind) for row in self.measured]
            self._known_means[kind] = bootstrap_means(scores)
        return self._known_means[kind]


# *** statistics ***


def bootstrap_means(
    scores: Sequence[np.ndarray[Any, Any]], resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray[Any, Any]:
    """Return the mean score of each method in resamples of the questions, [resamples, methods].

    Every resample draws as many questions as there are, with repeats, the same for all methods, so
    that their difference is paired. Where a method has several runs, it draws runs, too.

    Args:
        scores: Of each method [runs, questions].
        resamples: Number of resamples.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    questions = scores[0].shape[1]
    of_runs = np.concatenate(scores).T
    means = []
    for start in range(0, resamples, _AT_ONCE):
        drawn = min(_AT_ONCE, resamples - start)
        times = generator.multinomial(questions, np.full(questions, 1 / questions), drawn)
        means.append(times @ of_runs / questions)
    # [resamples, all runs]; then the runs of each method.
    ends = np.cumsum([len(own) for own in scores])[:-1]
    columns = []
    for own in np.split(np.concatenate(means), ends, axis=1):
        runs = own.shape[1]
        times = generator.multinomial(runs, np.full(runs, 1 / runs), resamples)
        columns.append((times * own).sum(axis=1) / runs)
    return np.stack(columns, axis=1)


def _difference(mean: float, resampled: np.ndarray[Any, Any]) -> Difference:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(mean, float(low), float(high))


def _least_share(count: int) -> float:
    """Return the least share of which `count` answers of `count` are likely (1 in 40).

    Resamples of answers that are all alike are alike, too, and a bootstrap would be certain. This
    end is that of the exact 95 % interval of a share (Clopper and Pearson, 1934).
    """
    return 0.025 ** (1 / count)


# *** words ***


def kept_at(policy: Policy | None, visual_tokens: int) -> str:
    """Return the tokens of an image that each site keeps, in words."""
    if policy is None:
        return ""
    if policy.image_scale != 1:
        # Case: smaller images, whose tokens differ.
        kept = [f"{step.site} {write_share(step.keep)}" for step in policy.reductions]
        return ", ".join([f"images at {policy.image_scale:.3g}", *kept])
    counts = policy.counts(visual_tokens)
    steps = zip(policy.reductions, counts, strict=True)
    return ", ".join(f"{reduction.site} {count}" for reduction, count in steps)


def options_in_words(values: Mapping[str, float]) -> str:
    """Return the options of a preset in words."""
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
