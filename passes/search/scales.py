"""Several scales of images in one search: which of them serves a budget best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.passes.search.checkpoints import Checkpoints
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.foreign import check_checkpoint
from deos_fx.passes.search.outcome import check_unreduced, compared
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.run import SearchRun
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.results.evidence import Evidence
from deos_fx.results.search_result import Candidate, SearchResult
from deos_fx.tokens.layout import PromptLayout

__all__ = ["ALONE", "ScaledData", "check_scales", "search_scales"]

ScaledData = Mapping[float, Iterable[Mapping[str, Any]]]
"""Batches by the scale at which their images entered."""

ALONE = "preset resize"
"""The source of a candidate that scales images and reduces nothing else."""


def check_scales(data: Mapping[Any, Any]) -> dict[float, list[Mapping[str, Any]]]:
    """Check the batches of a search at several scales, and return them from the largest scale on.

    Args:
        data: Batches by scale.

    Raises:
        TypeError: If it is a single batch.
        ValueError: If scale 1 is missing, a scale is out of range, or the batches are not of the
            same prompts, in the same order and with labels.
    """
    if not all(isinstance(scale, int | float) for scale in data):
        raise TypeError(
            "data is a dict whose keys are no scales of images; give a list of batches, or batches "
            "by scale."
        )
    if 1 not in data or not all(0 < scale <= 1 for scale in data):
        raise ValueError(
            f"data has the scales {', '.join(map(repr, data))}; give batches by scale in (0, 1], "
            "and those of 1 as well, to which a budget refers"
        )
    batches = {float(scale): list(data[scale]) for scale in sorted(data, reverse=True)}
    expected = [_answers(1, batch) for batch in batches[1]]
    for scale, own in batches.items():
        if [_answers(scale, batch) for batch in own] != expected:
            raise ValueError(
                f"the batches at scale {scale:g} have other answers than those at scale 1; make "
                "them of the same prompts, in the same order"
            )
    return batches


def _answers(scale: float, batch: Any) -> list[int]:
    """Return the tokens of all answers of a batch."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        # Without labels, the answers would be those of a model that sees images at this scale.
        raise ValueError(
            f"a batch at scale {scale:g} has no labels, without which scales cannot be compared; "
            "give answers"
        )
    found: list[int] = labels[labels >= 0].tolist()
    return found


def search_scales(
    model: PreTrainedModel,
    data: ScaledData,
    budget: Budget,
    sites: Sequence[str] | None,
    steps_of: Callable[[SearchProblem], int],
    seed: int,
    checkpoint: Checkpoints | None,
    preset_evaluations: int,
    progress: Progress | None,
) -> SearchResult:
    """Search the best policy under a budget, and the scale at which images enter.

    1. At each scale where smaller images alone are within the budget, they are scored. At the
       others, presets are scored.
    2. The better half of these others are searched further, so that hopeless scales cost little.

    All losses are those of the given answers to the same held-back prompts, so they compare.

    Args:
        model: The unmodified model.
        data: What `check_scales` returns.
        budget: The budget; fractions are of the unreduced model at scale 1.
        sites: Names of the sites to search, or None.
        steps_of: Returns the number of steps for a problem.
        seed: Seed of the order of the batches.
        checkpoint: Where states are saved, if anywhere.
        preset_evaluations: Losses that may be spent on presets, at each scale that is searched to
            the end.
        progress: Called as the search advances.

    Raises:
        ValueError: As `deos_fx.search`.
    """
    runs: dict[float, SearchRun] = {}
    estimate = Estimate(progress)
    interrupted = False
    for scale, batches in data.items():
        name = f"scale {scale:g}"
        saved = None if checkpoint is None else checkpoint.within(name)
        known = None if saved is None else partial(check_checkpoint, saved.folder, seed)
        own = None if progress is None else _labelled(progress, name)
        # At a smaller scale there may be fewer tokens than the budget allows, which is no mistake.
        limit = budget if scale == 1 else _without_tokens(budget)
        try:
            problem = SearchProblem.of(model, batches, limit, own, known, sites)
            if runs:
                problem = _limited_as(runs[1].problem, problem)
            run = SearchRun(
                problem,
                steps_of(problem),
                seed,
                saved,
                own,
                estimate=estimate,
                preset_evaluations=preset_evaluations,
            )
            _score(run, scale)
        except KeyboardInterrupt:
            # Case: before anything was scored at this scale.
            if not runs:
                raise
            interrupted = True
            break
        runs[scale] = run
        interrupted = run.interrupted
        if interrupted:
            break
    further = [] if interrupted else _better_half(runs)
    for i, scale in enumerate(further):
        run = runs[scale]
        # Twice: what comes after, an estimate takes for half a search.
        run.further = 2 * (len(further) - i - 1)
        run.advance(("steps", "variations"))
        if run.interrupted:
            break
    return _result(runs, interrupted)


def _better_half(runs: Mapping[float, SearchRun]) -> list[float]:
    """Return the scales to search further, the best first: there, images alone are too large."""
    scales = [scale for scale, run in runs.items() if not run.problem.meets(Policy())]
    scales.sort(key=lambda scale: _lowest(runs[scale]))
    return scales[: math.ceil(len(scales) / 2)]


def _lowest(run: SearchRun) -> float:
    """Return the lowest loss so far; infinite where no preset has met the limits."""
    return run.scoring.best.loss if run.scoring.candidates else math.inf


def _labelled(progress: Progress, label: str) -> Progress:
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)


def _without_tokens(budget: Budget) -> Budget:
    """Return a budget that no number of visual tokens breaks."""
    return replace(budget, visual_tokens=None if budget.visual_tokens is None else 1.0)


def _score(run: SearchRun, scale: float) -> None:
    """Score smaller images alone, or else presets."""
    if scale != 1 and run.problem.meets(Policy()):
        run.score_alone(ALONE)
    else:
        run.advance(("presets",))


def _limited_as(whole: SearchProblem, problem: SearchProblem) -> SearchProblem:
    """Return a problem at a smaller scale with the limits of the unscaled one, prompt by prompt."""
    allowed = {whole.layout: whole.limits} | {cost.layout: own for cost, own in whole.others}
    layouts = {batch.number: batch.layout for batch in (*whole.training, *whole.scoring)}
    limits: dict[PromptLayout, dict[str, float]] = {}
    for batch in (*problem.training, *problem.scoring):
        # Prompts that differ at scale 1 may be alike here: then the tighter limits hold.
        own = allowed[layouts.get(batch.number, whole.layout)]
        known = limits.setdefault(batch.layout, own)
        limits[batch.layout] = {name: min(own[name], known[name]) for name in own}
    return replace(
        problem,
        limits=limits[problem.layout],
        others=[(cost, limits.get(cost.layout, own)) for cost, own in problem.others],
    )


def _result(runs: Mapping[float, SearchRun], interrupted: bool) -> SearchResult:
    """Make the result of the best scale, beside the unreduced model at scale 1."""
    losses = {scale: _lowest(run) for scale, run in runs.items()}
    best = min(losses, key=lambda scale: losses[scale])
    found, whole = runs[best].result(), runs[1]
    unreduced_loss = whole.unreduced_loss
    if unreduced_loss is None:
        # Case: interrupted before it was known.
        unreduced_loss = check_unreduced(whole.problem)
    # The best stays first: measured times may have ruled out others with lower losses.
    first, *others = (_at(best, each) for each in found.candidates)
    others += [
        _at(scale, each)
        for scale, run in runs.items()
        if scale != best
        for each in run.scoring.candidates
    ]
    found = replace(
        found,
        policy=first.policy,
        candidates=[first, *sorted(others, key=lambda candidate: candidate.loss)],
        unreduced=whole.problem.cost.predict(Policy()),
        unreduced_loss=unreduced_loss,
        limits=whole.problem.limits,
        evaluations=found.evaluations
        + sum(run.spent for scale, run in runs.items() if scale != best),
        interrupted=interrupted or any(run.interrupted for run in runs.values()),
        scales=losses,
    )
    return found if found.interrupted else replace(found, evidence=_evidence(found, runs))


def _evidence(found: SearchResult, runs: Mapping[float, SearchRun]) -> Evidence | None:
    """Compare the result with the best preset at any scale, on the same held-back prompts."""
    best, *others = found.candidates
    rival = next((each for each in others if each.source.startswith("preset ")), None)
    if rival is None or rival.loss == math.inf or found.evidence is None:
        return found.evidence
    theirs, own = (
        runs[each.policy.image_scale].problem.static_losses(each.policy) for each in (rival, best)
    )
    return compared(found.evidence, rival, theirs, own)


def _at(scale: float, candidate: Candidate) -> Candidate:
    """Return a candidate with its scale, in its policy and in its origin."""
    source = candidate.source if scale == 1 else f"{candidate.source}, images at {scale:g}"
    policy = replace(candidate.policy, image_scale=scale)
    return replace(candidate, policy=policy, source=source)
