"""The tasks of the comparison: a trained model, and questions to search and to test with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from deos_fx import reference
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["BATCH", "TASKS", "Task", "load_task"]

BATCH = 16
"""Questions of a batch; an evaluation is a forward pass of one batch."""
# Search data comes from seeds 0, 1, ...; the test questions are the same for all of them.
_TEST_SEED = 7919

TASKS = ("reference", "garments")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        model: The trained model.
        processor: Its processor.
        make_examples: Takes a number, a split and a seed.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    make_examples: Callable[[int, str, int], list[reference.Example]]

    def data(self, questions: int, seed: int, *, labels: bool = True) -> list[dict[str, Tensor]]:
        """Make batches to search with; the last quarter is what a search holds back.

        Args:
            questions: Questions to train on; a third as many are held back, from a split of
                pictures that neither training nor test uses.
            seed: Seed of the questions.
            labels: Whether answers follow the questions, as labels of a loss. Without them, the
                unreduced model answers.
        """
        held_back = questions // 3
        # Few questions make small batches, so that there is always one to hold back.
        size = min(BATCH, max(1, held_back))
        examples = self.make_examples(questions, "train", seed)
        examples += self.make_examples(held_back, "validation", seed)
        return list(reference.batches(self.processor, examples, size, answers=labels))

    def problem(
        self, budget: int | float, questions: int, seed: int, *, labels: bool = True
    ) -> SearchProblem:
        """Make the problem of a search; the budget limits visual tokens, as in `Budget`."""
        data = self.data(questions, seed, labels=labels)
        return SearchProblem.of(self.model, data, Budget(visual_tokens=budget))

    def accuracy(self, policy: Policy, tests: int) -> dict[str, float]:
        """Return the share of right answers, overall and of each kind, to so many questions."""
        examples = self.make_examples(tests, "test", _TEST_SEED)
        reduced = ReducedModel(self.model, policy)
        return reference.accuracy(reduced.generate, self.processor, examples)


def load_task(name: str, data: Path | None = None) -> Task:
    """Load a task.

    Args:
        name: One of `TASKS`.
        data: Folder of the photographs that scenes of ``garments`` are made of.

    Raises:
        ValueError: If there is no such task, or it needs a folder.
    """
    if name == "reference":
        return Task(*reference.load(), reference.make_examples)
    if name != "garments":
        raise ValueError(f"no task {name!r}; choose from {', '.join(TASKS)}")
    if data is None:
        raise ValueError("garments needs the folder of its photographs: give --data DIR")
    from benchmarks import garments

    options: Mapping[str, Any] = {"data": data}
    return Task(
        *garments.load(),
        lambda count, split, seed: garments.make_examples(count, split, seed, **options),
    )
