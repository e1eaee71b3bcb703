"""Run methods on the test questions: the model itself, policies, presets, and less of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from deos_fx.comparison.answers import Metric, answer_loss, generated, inputs_for
from deos_fx.cost.amounts import Cost
from deos_fx.cost.latency import in_turns
from deos_fx.cost.memory import peak_bytes
from deos_fx.cost.model import CostModel
from deos_fx.data import Record, batches
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.presets.fitting import fit, options
from deos_fx.presets.rule import Option
from deos_fx.presets.tuning import Tuned, tune
from deos_fx.results.compared import Row, Run
from deos_fx.results.methods import UNREDUCED
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.words import counted

__all__ = ["RESIZED", "TEXT_ONLY", "Bench", "Draft", "Tuner"]

RESIZED = "smaller image"

TEXT_ONLY = "no image"


@dataclass(frozen=True)
class _Tested:
    """What was found out about one way to run the model; `prefill` is timed at the end."""

    answers: list[str]
    scores: list[float]
    cost: Cost
    prefill: Callable[[], object]


@dataclass(frozen=True)
class _Attempt:
    """A run of a method, before it is timed."""

    tested: _Tested
    policy: Policy | None = None
    seed: int = 0
    values: Mapping[str, float] | None = None
    evaluations: int = 0


@dataclass(frozen=True)
class Draft:
    """A row, before it is timed."""

    name: str
    group: str
    attempts: Sequence[_Attempt]
    reason: str = ""


class Bench:
    """Runs methods on the test questions; equal policies are run once."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        test: Sequence[Record],
        budget: Budget | None,
        policies: Iterable[Policy],
        metric: Metric | None,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.processor = processor
        self.test = test
        self.metric = metric
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.facts: ModelFacts = facts_of(model)
        self.costs = self._costs(processor)
        whole = self.costs.predict(Policy())
        if budget is not None:
            self.limit = budget.limits(whole)["visual_tokens"]
        else:
            # Case: presets may keep as many as any of the policies does.
            self.limit = max(map(self.visual_tokens, policies), default=whole.visual_tokens)
        self.share = self.limit / whole.visual_tokens
        self._known: dict[str, _Tested] = {}

    def visual_tokens(self, policy: Policy) -> float:
        """Return the visual tokens of the first question, mean over the decoder layers."""
        _, costs = self._entering(ReducedModel(self.model, policy))
        return costs.predict(policy).visual_tokens

    def check_runs(self, policy: Policy) -> None:
        """Refuse a policy that the model cannot run on the first question.

        Raises:
            ValueError: If it is refused.
        """
        reduced = ReducedModel(self.model, policy)
        reduced.capture(**self._first(reduced.processor(self.processor)))

    # *** the rows ***

    def unreduced(self) -> Draft:
        """Test the model as it is; its graph without reductions is timed, as those of others."""
        reduced = ReducedModel(self.model, Policy())
        cost = self.costs.predict(Policy())
        tested = self._tested(self._generate, self.processor, cost, reduced)
        return Draft(UNREDUCED, "unreduced", [_Attempt(tested)])

    def given(self, name: str, policy: Policy) -> Draft:
        """Test a policy of the user."""
        return Draft(name, "policy", [_Attempt(self._policy(policy), policy)])

    def preset(self, name: str, tuner: Tuner | None, seeds: int) -> Draft:
        """Test a preset, fitted and perhaps tuned; with a reason if the model cannot run it."""
        try:
            attempts = [
                self._attempt(name, tuner, seed) for seed in self._seeds(name, tuner, seeds)
            ]
        except ValueError as error:
            return Draft(name, "preset", [], str(error))
        return Draft(name, "preset", attempts)

    def resized(self) -> Draft:
        """Test images that are resized to as few visual tokens: a policy that does nothing else."""
        policy = Policy(name="resize", image_scale=math.sqrt(self.share))
        try:
            left = self.visual_tokens(policy)
        except ValueError as error:
            return Draft(RESIZED, "input", [], str(error))
        if left > self.limit + 1e-9:
            reason = (
                f"the processor makes {counted(f'{left:g}', 'visual token')} of the first image "
                f"when it is made as small as a limit of {self.limit:.4g} asks for"
            )
            return Draft(RESIZED, "input", [], reason)
        return Draft(RESIZED, "input", [_Attempt(self._policy(policy), policy)])

    def text_only(self) -> Draft:
        """Test prompts without their images: what the words alone give away."""
        cost = self.costs.without_images()
        tested = self._tested(self._generate, self.processor, cost, self.model, images=False)
        return Draft(TEXT_ONLY, "input", [_Attempt(tested)])

    def timed(self, drafts: Sequence[Draft]) -> list[Row]:
        """Measure a prefill of every method, in time by turns, and finish the rows."""
        every = [attempt.tested for draft in drafts for attempt in draft.attempts]
        calls = [tested.prefill for tested in {id(tested): tested for tested in every}.values()]
        times = in_turns(calls, self.model.device)
        peaks = [peak_bytes(call, self.model.device) for call in calls]
        of = dict(zip(calls, zip(times, peaks, strict=True), strict=True))
        return [
            Row(
                draft.name,
                draft.group,
                [_run(attempt, *of[attempt.tested.prefill]) for attempt in draft.attempts],
                draft.reason,
            )
            for draft in drafts
        ]

    # *** their parts ***

    def _generate(self, **inputs: Any) -> Any:
        model: Any = self.model
        return model.generate(**inputs)

    def per_image(self, policy: Policy) -> Policy:
        """Return a policy that was fitted to one image, for images of any size."""
        return self.costs.for_any_size(policy)

    @cached_property
    def fitting(self) -> dict[str, Any]:
        """Return the arguments that presets are fitted with: to the first image."""
        layout = self.costs.layout
        size = layout.grid if self.facts.sizes_vary else None
        return {
            # Its part of the limit.
            "budget_tokens": self.limit * layout.sizes[0] / sum(layout.sizes),
            "model": self.model,
            "visual_tokens": size,
            "example_inputs": self._first(self.processor),
        }

    def _seeds(self, name: str, tuner: Tuner | None, seeds: int) -> Sequence[int]:
        """Return the seeds of a preset: one alone, where nothing is random."""
        own = self._options(name)
        tuned = tuner is not None and any(option.tuned for option in own.values())
        return range(seeds) if tuned or "seed" in own else (0,)

    def _options(self, name: str) -> Mapping[str, Option]:
        fitting = self.fitting
        return options(name, self.model, fitting["visual_tokens"], fitting["example_inputs"])

    def _attempt(self, name: str, tuner: Tuner | None, seed: int) -> _Attempt:
        values: Mapping[str, float] = {}
        evaluations = 0
        if "seed" in self._options(name):
            values = {"seed": seed}
            policy = fit(name, **self.fitting, seed=seed)
        elif tuner is None:
            policy = fit(name, **self.fitting)
        else:
            tuned = tuner.tune(name, seed)
            policy, values, evaluations = tuned.policy, tuned.values, tuned.evaluations
        policy = self.per_image(policy)
        return _Attempt(self._policy(policy), policy, seed, values, evaluations)

    def _policy(self, policy: Policy) -> _Tested:
        key = replace(policy, name="").to_json()
        if key not in self._known:
            reduced = ReducedModel(self.model, policy)
            processor, costs = self._entering(reduced)
            cost = costs.predict(policy)
            self._known[key] = self._tested(reduced.generate, processor, cost, reduced)
        return self._known[key]

    def _entering(self, reduced: ReducedModel) -> tuple[Any, CostModel]:
        """Return the processor that goes with a reduced model, and the costs of what it makes."""
        processor = reduced.processor(self.processor)
        scaled = reduced.policy.image_scale != 1
        return processor, self._costs(processor) if scaled else self.costs

    def _tested(
        self,
        generate: Callable[..., Any],
        processor: Any,
        cost: Cost,
        run: Callable[..., Any],
        images: bool = True,
    ) -> _Tested:
        answers = generated(
            generate,
            self.model,
            processor,
            self.test,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            images=images,
        )
        pairs = zip(answers, self.test, strict=True)
        scores = [] if self.metric is None else [self.metric(*pair) for pair in pairs]
        inputs = self._first(processor, images)

        def prefill() -> None:
            with torch.no_grad():
                run(**inputs)

        return _Tested(answers, scores, cost, prefill)

    def _first(self, processor: Any, images: bool = True) -> dict[str, Any]:
        """Return the inputs of the first prompt."""
        asked = replace(self.test[0], answer=None)
        (inputs,) = batches(processor, [asked], 1, images=images)
        return inputs_for(self.model, inputs)

    def _costs(self, processor: Any) -> CostModel:
        return CostModel.of_call(completed(Call.of(self.facts, self._first(processor))))


class Tuner:
    """Tunes presets on questions with answers."""

    def __init__(self, bench: Bench, records: Sequence[Record], evaluations: int) -> None:
        self.bench = bench
        self.records = records
        self.evaluations = evaluations
        self._batches = list(batches(bench.processor, records, bench.batch_size))

    def tune(self, name: str, seed: int) -> Tuned:
        """Find the best setting of a preset."""
        return tune(
            name,
            evaluate=self._loss,
            evaluations=self.evaluations,
            seed=seed,
            **self.bench.fitting,
        )

    def _loss(self, policy: Policy) -> float:
        reduced = ReducedModel(self.bench.model, self.bench.per_image(policy))
        return answer_loss(reduced, self.bench.model, self._batches)


def _run(attempt: _Attempt, milliseconds: float, peak: int | None) -> Run:
    tested = attempt.tested
    return Run(
        answers=tested.answers,
        scores=tested.scores,
        cost=tested.cost,
        milliseconds=milliseconds,
        peak_bytes=peak,
        policy=attempt.policy,
        seed=attempt.seed,
        values=attempt.values or {},
        evaluations=attempt.evaluations,
    )
