"""The outcome of a search: the best of its candidates, how it was found and its losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deos_fx.cost.latency import milliseconds
from deos_fx.forms.relaxed_parameters import has_relaxed_form
from deos_fx.passes.search import processes
from deos_fx.passes.search.batches import SearchBatch
from deos_fx.passes.search.descent import GATE_TEMPERATURES, relaxed_graph
from deos_fx.passes.search.looks import looks_of
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.space import relaxed
from deos_fx.passes.search.timing import prefill
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.evidence import Evidence
from deos_fx.results.search_result import Candidate, SearchResult

__all__ = ["RUNNERS_UP", "check_can_be_met", "check_unreduced", "compared", "result_of"]

RUNNERS_UP = 24
"""Tokens that stay in the sequence beside those that are kept, during the steps."""


def check_unreduced(problem: SearchProblem) -> float:
    """Return the loss of the unreduced model on the scoring batches.

    Raises:
        ValueError: If it is NaN or infinite: then no policy can be told from another.
    """
    loss = problem.static_loss(Policy())
    if loss == math.inf:
        numbers = [batch.number for batch in problem.scoring]
        raise ValueError(
            "The loss of the unreduced model is NaN or infinite on the data that policies are "
            f"scored on, the batches {numbers[0]} to {numbers[-1]} of data (from 0). Leave out "
            "what is damaged there, or load the model in float32 or bfloat16."
        )
    return loss


def check_can_be_met(problem: SearchProblem) -> None:
    """Refuse limits that even one visual token at the best of all sites breaks.

    Raises:
        ValueError: If they are refused.
    """
    names = [site.name for site in problem.sites.available()]
    fewest = [Policy((Reduction(name, 1, scores={"feature_norm": 1.0}),)) for name in names]
    if not any(problem.meets(policy) for policy in (Policy(), *fewest)):
        raise _cannot_be_met(problem)


def _cannot_be_met(problem: SearchProblem) -> ValueError:
    if problem.names is None:
        found, remedy = "No policy", "Raise the budget."
    else:
        found = f"No policy at {', '.join(problem.names)}"
        remedy = "Raise the budget, or search other sites."
    return ValueError(
        f"{found} meets the limits {problem.limits}: even one visual token at every site is too "
        f"much. {remedy}"
    )


def result_of(
    problem: SearchProblem,
    candidates: Sequence[Candidate],
    history: list[dict[str, Any]],
    unreduced_loss: float,
    interrupted: bool,
) -> SearchResult:
    """Make the result of a search.

    Args:
        problem: The problem.
        candidates: The candidates; of equal losses, the earlier one wins.
        history: One record for each step.
        unreduced_loss: The loss of the unreduced model.
        interrupted: Whether the search was cut short.

    Returns:
        The result.

    Raises:
        ValueError: If no candidate meets the limits, or none has a loss.
    """
    if not candidates:
        raise _cannot_be_met(problem)
    # Sorting is stable.
    candidates = _in_time(problem, sorted(candidates, key=lambda candidate: candidate.loss))
    best = candidates[0]
    if best.loss == math.inf:
        raise ValueError(
            f"The loss of every policy that was tried, of {len(candidates)}, is NaN or infinite. "
            "Load the model in float32 or bfloat16, or raise the budget."
        )
    # The signature of the model lets the policy be refused by other models.
    policy = replace(best.policy, name="searched", model=problem.cost.signature)
    return SearchResult(
        policy=policy,
        history=history,
        candidates=[replace(best, policy=policy), *candidates[1:]],
        limits=problem.limits,
        unreduced=problem.cost.predict(Policy()),
        unreduced_loss=unreduced_loss,
        relaxed_loss=_relaxed_loss(problem, policy),
        interrupted=interrupted,
        looks=looks_of(problem, policy),
        evidence=_evidence(problem, candidates),
    )


def _evidence(problem: SearchProblem, candidates: Sequence[Candidate]) -> Evidence:
    """Say what data a result rests on, and compare it with the best preset, batch by batch."""
    best, scoring = candidates[0], problem.scoring
    evidence = Evidence(
        model=str(problem.cost.signature),
        trained=_prompts(problem.training),
        scored=_prompts(scoring),
        held_back=not any(batch is other for batch in scoring for other in problem.training),
        answers=scoring[0].target.labels is not None,
    )
    preset = next((each for each in candidates if each.source.startswith("preset ")), None)
    if preset is None or preset is best or preset.loss == math.inf:
        return evidence
    theirs, own = (problem.static_losses(each.policy) for each in (preset, best))
    return compared(evidence, preset, theirs, own)


def compared(
    evidence: Evidence, preset: Candidate, theirs: Sequence[float], own: Sequence[float]
) -> Evidence:
    """Say how the best policy compares with a preset.

    Args:
        evidence: What is known of the data.
        preset: The preset.
        theirs: Its losses on the scoring batches.
        own: Those of the best policy.
    """
    leads = [loss - best for loss, best in zip(theirs, own, strict=True)]
    error = math.inf
    if len(leads) > 1:
        error = statistics.stdev(leads) / math.sqrt(len(leads))
    return replace(
        evidence,
        preset=preset.source,
        preset_loss=preset.loss,
        lead=statistics.fmean(leads),
        error=error,
    )


def _prompts(batches: Sequence[SearchBatch]) -> int:
    return sum(len(batch.call.inputs["input_ids"]) for batch in batches)


def _in_time(problem: SearchProblem, candidates: list[Candidate]) -> list[Candidate]:
    """Drop the best candidates until the measured latency of the first meets the limit.

    Raises:
        ValueError: If no candidate meets it.
    """
    # Case: a limit of another machine. Its table has answered already.
    limit = problem.limits["latency_ms"] if problem.timed_here else math.inf
    while limit < math.inf and candidates:
        # Measuring takes long, so candidates are measured only until one is fast enough.
        own = milliseconds(
            prefill(problem.captures, problem.scoring, candidates[0].policy), problem.model.device
        )
        (time,) = processes.of_main([own])
        if time <= limit:
            break
        candidates = candidates[1:]
    if not candidates:
        raise ValueError(
            f"No policy was measured within {limit:g} ms per prefill on {problem.model.device}. "
            "Raise latency_ms."
        )
    return candidates


def _relaxed_loss(problem: SearchProblem, policy: Policy) -> float:
    """Return the task loss of a policy in its relaxed form, at the last gate temperature.

    It is NaN where a reduction has no such form: of groups of patches, and some of presets.
    """
    steps = policy.reductions
    if any(problem.sites.in_groups(step.site) for step in steps) or not all(
        map(has_relaxed_form, steps)
    ):
        return math.nan
    settings = {"runners_up": RUNNERS_UP, "gate_temperature": GATE_TEMPERATURES[1]}
    reductions = relaxed(policy, problem.visual_tokens, **settings)
    return problem.mean_loss(lambda batch: relaxed_graph(reductions, batch))
