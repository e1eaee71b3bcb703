"""Measure the methods that the demo compares; presets in a process of their own."""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from deos_fx import presets, reference
from deos_fx.cli.terminal import Advance
from deos_fx.cost.model import CostModel
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.presets.tuning import Tuned, require_optuna
from deos_fx.reference import Example
from deos_fx.results.methods import Method
from deos_fx.runtime.reduced_model import ReducedModel

__all__ = ["BATCH", "PresetTest", "Tester", "prompts", "search_data", "tested_presets"]

# Questions in each part of the data.
TRAINING, VALIDATION, TEST = 384, 128, 480
BATCH = 16

LOSSES = 20
"""Losses that tuning a preset may take; all presets together take about as many as the search."""


# *** data ***


def search_data(processor: LlavaProcessor, seed: int) -> list[dict[str, Tensor]]:
    """Make labelled batches; the search scores its candidates on the last quarter of them."""
    training = reference.make_examples(TRAINING, "train", seed)
    validation = reference.make_examples(VALIDATION, "validation", seed)
    return list(reference.batches(processor, training + validation, BATCH))


def prompts(processor: LlavaProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Make one batch of prompts without answers."""
    return next(reference.batches(processor, examples, len(examples), answers=False))


def _text_tokens(processor: LlavaProcessor, examples: Sequence[Example]) -> int:
    """Count the text tokens of the longest prompt, to which a batch is padded."""
    # All prompts have equally many visual tokens, so those of the first serve for all.
    ids = prompts(processor, examples)["input_ids"]
    return ids.shape[1] - int((ids[0] == processor.image_token_id).sum())


# *** testing ***


class Tester:
    """Lets methods answer the test questions.

    Args:
        model: The reference model.
        processor: Its processor.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        self.processor = processor
        self.questions = reference.make_examples(TEST, "test")
        self.costs = CostModel.of_images(
            model, images=1, text_tokens=_text_tokens(processor, self.questions)
        )

    def limit(self, budget: Budget) -> float:
        """Return the visual tokens that a budget allows, mean over the decoder layers."""
        return budget.limits(self.costs.predict(Policy()))["visual_tokens"]

    def test(
        self, name: str, policy: Policy, model: Any, advance: Advance = lambda done, total: None
    ) -> Method:
        """Answer the questions and count the right answers."""
        recorder = _Recorder(model.generate, self.processor, len(self.questions), advance)
        accuracy = reference.accuracy(recorder, self.processor, self.questions)
        cost = self.costs.predict(policy)
        return Method(name, policy, cost, accuracy, answers=recorder.answers)


class _Recorder:
    """A generate function that records its answers and reports its progress.

    `reference.accuracy` only counts right answers; the report shows them as well.
    """

    def __init__(
        self, generate: Callable[..., Any], processor: LlavaProcessor, total: int, advance: Advance
    ) -> None:
        self.generate = generate
        self.processor = processor
        self.total = total
        self.advance = advance
        self.answers: list[str] = []

    def __call__(self, **inputs: Tensor) -> Tensor:
        # Ids begin with the prompt; only what follows is the answer.
        ids = self.generate(**inputs)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        self.answers += [text.strip() for text in texts]
        self.advance(len(self.answers), self.total)
        return ids


# *** presets, beside the search ***


@dataclass(frozen=True)
class PresetTest:
    """What was found out about a preset.

    Attributes:
        method: Its answers with the best setting, or why it cannot be measured.
        evaluations: Forward passes of a batch that tuning it took.
    """

    method: Method
    evaluations: int


@contextmanager
def tested_presets(budget: Budget, seed: int) -> Iterator[Iterator[PresetTest]]:
    """Tune and test all presets in a second process, which begins at once.

    A search of a small model keeps one core busy; the presets take the other.

    Args:
        budget: The limit on visual tokens.
        seed: Seed of the data of the search, on which presets are tuned.

    Yields:
        An iterator that waits for each preset in turn, in the order of `presets.names`.
    """
    # Not a fork: torch's threads do not survive one.
    with multiprocessing.get_context("spawn").Pool(1, initializer=_begin) as pool:
        yield pool.imap(functools.partial(_tested, budget, seed), presets.names())
        # The process ends on its own and cleans up; only after a failure it is killed.
        pool.close()
        pool.join()


def _begin() -> None:
    # Ctrl-C ends the search early; the presets go on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


class _Bench:
    """What all presets share: the model, the data of the search, and the test questions."""

    def __init__(self, budget: Budget, seed: int) -> None:
        self.model, processor = reference.load()
        self.tester = Tester(self.model, processor)
        self.limit = self.tester.limit(budget)
        self.problem: SearchProblem | None = None
        try:
            require_optuna()
        except ImportError:
            # Case: presets keep their published settings.
            return
        data = search_data(processor, seed)
        self.problem = SearchProblem.of(self.model, data, budget)

    def tuned(self, name: str, seed: int) -> Tuned:
        """Fit a preset to the budget and tune its own options, if that can be done."""
        problem = self.problem
        if problem is None:
            return Tuned(presets.fit(name, self.limit, self.model), {}, 0.0, ())
        loss = problem.checked_loss
        return presets.tune(name, self.limit, self.model, loss, LOSSES, seed=seed)


# One for all presets; only in the process of the presets.
_bench = functools.cache(_Bench)


def _tested(budget: Budget, seed: int, name: str) -> PresetTest:
    bench = _bench(budget, seed)
    # A method that cannot meet the budget gets a row with the reason, not an error.
    try:
        tuned = bench.tuned(name, seed)
    except ValueError as error:
        nothing = Policy()
        cost = bench.tester.costs.predict(nothing)
        return PresetTest(Method(name, nothing, cost, {}, reason=str(error)), 0)
    reduced = ReducedModel(bench.model, tuned.policy)
    method = bench.tester.test(name, tuned.policy, reduced)
    batches = len(bench.problem.scoring) if bench.problem is not None else 0
    return PresetTest(method, tuned.evaluations * batches)
