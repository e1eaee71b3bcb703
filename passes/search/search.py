"""Search where to reduce, how many tokens to keep and how to treat the rest, by gradient.

The model is frozen. At a few places where the limits can be met, the parameters of a reduction are
trained on its relaxed form: scores, learned directions, and what happens to dropped tokens. A few
steps show which place is best; there, training goes on. Presets, fitted to the same limits, and
small changes of the best candidate are tried as well. All candidates are scored in *static* form,
the form that is deployed, on held-back data, and the best is returned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from deos_fx.cost.latency import milliseconds
from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search.descent import GATE_TEMPERATURES, Descent, relaxed_graph, site_tokens
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import (
    discretise,
    from_presets,
    in_regimes,
    placed,
    placements,
    variations,
)
from deos_fx.passes.search.space import relaxed, start_reduction
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.budget import Budget, check_budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import site_order
from deos_fx.results.search_result import Candidate, SearchResult

__all__ = ["STAGES", "SearchRun", "default_steps", "search"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage (``presets``, ``steps``, ...), the number done and the total."""

# Tokens that stay in the sequence beside those that are kept.
_RUNNERS_UP = 24
# Steps at each place, if there are several; the best go on for a third of all steps.
_TRIAL = 24
# What a site has to earn: the loss of a place counts so much more for each site after the first.
_CHARGE = 0.05
# Steps by default: so many passes over the data, within limits.
_EPOCHS, _FEWEST, _MOST = 8, 60, 240
_CHECKPOINT_EVERY = 10
# Small changes of the best candidate, at the end.
_VARIATIONS = 24
STAGES = ("presets", "steps", "variations")
"""What a search does, in this order."""


def search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    *,
    budget: Budget,
    sites: Sequence[str] | None = None,
    steps: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the policy with the lowest task loss that meets a budget.

    Args:
        model: An unmodified transformers vision-language model.
        data: Model input dicts (batches), all with equally many images per prompt; the images of a
            batch are alike in size. Where the model has more visual tokens for larger images, the
            sizes may differ between batches, and the policy keeps shares of each image. With
            ``labels`` the task is cross-entropy on them, otherwise the distance to the unreduced
            model's own predictions. From four batches on, a quarter is held back for scoring
            candidates. Reductions see no token from the first label on.
        budget: At least one limit.
        sites: Names of the sites to search, such as ``vision.11`` or ``decoder.2``; left out, the
            projector and all sites in the decoder.
        steps: Number of gradient steps at the best place; left out, it follows from the data:
            eight passes, at least 60 and at most 240 steps.
        seed: Seed of the order of the batches.
        checkpoint: Folder to save the state of the steps in. A search that finds a state there
            continues it, bit-identically.
        progress: Called as the search advances, with a stage, the number done and the total.

    Returns:
        The result; its policy meets every limit exactly.

    Raises:
        ValueError: If the data is empty or uneven, a site cannot be reduced, the budget cannot be
            met, or the checkpoint is of another search.
        TypeError: If an argument is of a wrong type.

    Ctrl-C ends the search, at any time, with the best policy so far.
    """
    # Mistakes in the arguments are found before anything expensive.
    check_budget(budget)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps is {steps!r}; give the number of gradient steps, at least 1.")
    problem = SearchProblem.of(model, data, budget.require())
    searched = problem.searched_sites(sites)
    run = SearchRun(problem, steps or default_steps(problem), seed, checkpoint, progress)
    run.advance(searched)
    return _result(problem, run)


def default_steps(problem: SearchProblem) -> int:
    """Return how many steps the data is good for."""
    prompts = sum(len(batch.call.inputs["input_ids"]) for batch in problem.training)
    return min(_MOST, max(_FEWEST, _EPOCHS * prompts // 16))


def _known(problem: SearchProblem) -> list[tuple[str, Policy]]:
    """Return what needs no search: no reduction, if the limits allow that, and the presets."""
    nothing = [("no reduction", Policy())] if problem.meets(Policy()) else []
    return nothing + from_presets(problem)


@dataclass
class SearchRun:
    """A search under way.

    Attributes:
        problem: The problem.
        steps: Number of steps at the best place.
        seed: Seed of the order of the batches.
        checkpoint: Folder for the states of the steps.
        progress: Called as the search advances.
        descents: The descents so far, the last one the present one.
        interrupted: Whether it was cut short.
    """

    problem: SearchProblem
    steps: int
    seed: int
    checkpoint: str | os.PathLike[str] | None
    progress: Progress | None
    descents: list[Descent] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.scoring = _Scoring(self.problem, self.progress)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the steps at the best place; of an interrupted search, those at the last place."""
        # The last of those that were to take the most steps.
        longest = max(reversed(self.descents), key=lambda descent: descent.steps, default=None)
        return longest.state.history if longest else []

    def advance(
        self, sites: Sequence[Site], stages: Sequence[str] = STAGES, most: int = _VARIATIONS
    ) -> None:
        """Go through the stages of the search, until the end or an interruption.

        Args:
            sites: The sites to search.
            stages: Those of `STAGES` that are not left out.
            most: Largest number of variations.
        """
        try:
            if "presets" in stages:
                self.scoring.add_all("presets", _known(self.problem))
            if "steps" in stages:
                self.train(self.places(sites), sites)
            if "variations" in stages:
                _polish(self.problem, self.scoring, "variations", most)
        except KeyboardInterrupt:
            # The user wants a result now.
            self.interrupted = True
        self.round_up()

    def places(self, sites: Sequence[Site]) -> list[Policy]:
        """Return the starts of the steps at every place that is tried."""
        return placements(self.problem, sites, self._starts)

    def _starts(self, sites: Sequence[Site]) -> dict[str, Reduction]:
        """Return what the steps start from at some sites, by name."""
        tokens = site_tokens(self.problem, sites)
        return {site.name: start_reduction(site, tokens[site.name]) for site in sites}

    def train(self, starts: Sequence[Policy], sites: Sequence[Site] = ()) -> None:
        """Try every place for a few steps, the best for some more, and train on at the winner.

        Args:
            starts: What the steps start from at each place.
            sites: Sites to which the last site of the best place may move.
        """
        if len(starts) > 1:
            names = [f"place {i + 1} of {len(starts)}" for i in range(len(starts))]
            tried = [self.attempt(*each) for each in zip(names, starts, strict=True)]
            tried += self.moved(min(tried, key=_charged), sites)
            # The best single site and the best pair: a site alone has fewer chances, and is
            # simpler.
            best = {len(each.reductions): each for each in sorted(tried, key=_charged)[::-1]}
            starts = [self.rounded(descent) for descent in best.values()]
        if len(starts) > 1:
            names = [f"finalist {i + 1} of {len(starts)}" for i in range(len(starts))]
            more = max(1, self.steps // 3)
            tried = [self.descend(*each, more) for each in zip(names, starts, strict=True)]
            starts = [self.rounded(min(tried, key=_charged))]
        for start in starts:
            reached = self.rounded(self.descend("steps", start, self.steps))
            settled = self.settled(reached)
            if settled != reached:
                # Case: in another regime there is more to gain.
                self.settled(self.rounded(self.descend("regime", settled, max(1, self.steps // 2))))

    def attempt(self, stage: str, start: Policy) -> Descent:
        """Take the few steps that show how good a place is."""
        return self.descend(stage, start, min(_TRIAL, self.steps))

    def moved(self, best: Descent, sites: Sequence[Site]) -> list[Descent]:
        """Move the last site of a place, by ever shorter distances, while that is better.

        Args:
            best: The best place so far.
            sites: The sites, in order of depth.

        Returns:
            The places that were tried.
        """
        order = [site.name for site in sites]
        seen = [list(descent.reductions) for descent in self.descents]
        found: list[Descent] = []
        distance = len(order) // 4
        while distance:
            *before, last = best.reductions
            depths = (order.index(last) + shift for shift in (-distance, distance))
            nearer = [[*before, order[i]] for i in depths if 0 <= i < len(order)]
            new = []
            for names in nearer:
                start = self._start(names) if names not in seen else None
                seen.append(names)
                if start is not None:
                    new.append(self.attempt(f"place {' and '.join(names)}", start))
            found += new
            better = min([best, *new], key=_charged)
            # As far again in the direction that helps, or half as far.
            distance = distance // 2 if better is best else distance
            best = better
        return found

    def _start(self, names: Sequence[str]) -> Policy | None:
        """Return the start at a place, if there can be one."""
        if site_order(names[0]) >= site_order(names[-1]) and len(names) > 1:
            return None
        starts = self._starts([self.problem.sites[name] for name in names])
        return placed(self.problem, [starts[name] for name in names])

    def settled(self, policy: Policy) -> Policy:
        """Return a policy or the same in a regime as it is defined, whichever is best."""
        names = " and ".join(reduction.site for reduction in policy.reductions)
        found = [policy]
        for other in in_regimes(policy):
            fitted = self.problem.fit(other) if self.problem.runs(other) else None
            if fitted is not None:
                found.append(fitted)
        losses = []
        for each in found:
            if not self.scoring.has(each):
                self.scoring.add(f"gradient at {names}", each)
            losses.append(self.scoring.loss(each))
        return found[losses.index(min(losses))]

    def descend(self, stage: str, start: Policy, steps: int) -> Descent:
        """Take gradient steps from a policy, and score what they reach."""
        settings = {
            "steps": steps,
            "seed": self.seed,
            "limits": self.problem.limits,
            "start": [str(reduction) for reduction in start.reductions],
            **self.problem.fingerprint(),
        }
        reductions = relaxed(start, self.problem.visual_tokens, runners_up=_RUNNERS_UP)
        state = SearchState.start(reductions, AugmentedLagrangian(self.problem.limits), settings)
        descent = Descent(self.problem, state, steps, self.seed)
        self.descents.append(descent)
        folder = None if self.checkpoint is None else Path(self.checkpoint) / stage
        # Steps that were stopped go on with their parameters, optimizer, multipliers and history.
        if folder is not None:
            state.resume(folder)

        def after_step(done: int) -> None:
            if folder is not None and done % _CHECKPOINT_EVERY == 0:
                state.save(folder)
            if self.progress is not None:
                self.progress(stage, done, steps)

        try:
            descent.run(after_step)
        finally:
            # Also after an interruption, so that a search can go on from where it was stopped.
            if folder is not None:
                state.save(folder)
        self.score(descent)
        return descent

    def rounded(self, descent: Descent) -> Policy:
        """Return the best policy that a descent has reached, fitted to the limits."""
        descent.state.take_best()
        policy = discretise(descent.reductions, self.problem.visual_tokens)
        return self.problem.fit(policy) or policy

    def score(self, descent: Descent) -> None:
        """Add what a descent has reached to the candidates."""
        policy = self.rounded(descent)
        if self.problem.meets(policy) and not self.scoring.has(policy):
            names = " and ".join(reduction.site for reduction in policy.reductions)
            self.scoring.add(f"gradient at {names}", policy)

    def round_up(self) -> None:
        """Score what an interruption has left."""
        for descent in self.descents if self.interrupted else ():
            self.score(descent)
        if not self.scoring.candidates:
            # Case: interrupted before anything was scored.
            for source, policy in _known(self.problem)[:1]:
                self.scoring.add(source, policy)


# *** the choice ***


def _charged(descent: Descent) -> float:
    """Return the loss that a descent has reached, with a charge for every site but the first."""
    return descent.state.best_loss * (1 + _CHARGE * (len(descent.reductions) - 1))


def _result(problem: SearchProblem, run: SearchRun) -> SearchResult:
    """Make the result: the best candidate, how it was found and its losses.

    Raises:
        ValueError: If no candidate meets the limits.
    """
    candidates = run.scoring.candidates
    if not candidates:
        raise ValueError(
            f"No policy meets the limits {problem.limits}: even one visual token at every site is "
            "too much. Raise the budget."
        )
    # Sorting is stable: of equal losses, the earlier proposal wins.
    candidates = _in_time(problem, sorted(candidates, key=lambda candidate: candidate.loss))
    best = candidates[0]
    # The signature of the model lets the policy be refused by other models.
    policy = replace(best.policy, name="searched", model=problem.cost.signature)
    return SearchResult(
        policy=policy,
        history=run.history,
        candidates=[replace(best, policy=policy), *candidates[1:]],
        limits=problem.limits,
        unreduced=problem.cost.predict(Policy()),
        unreduced_loss=problem.static_loss(Policy()),
        relaxed_loss=_relaxed_loss(problem, policy),
        interrupted=run.interrupted,
    )


def _in_time(problem: SearchProblem, candidates: list[Candidate]) -> list[Candidate]:
    """Drop the best candidates until the measured latency of the first meets the limit.

    Raises:
        ValueError: If no candidate meets it.
    """
    limit = problem.limits.get("latency_ms", math.inf)
    while limit < math.inf and candidates:
        # Measuring takes long, so candidates are measured only until one is fast enough.
        time = milliseconds(problem.prefill(candidates[0].policy), problem.model.device)
        if time <= limit:
            break
        candidates = candidates[1:]
    if not candidates:
        raise ValueError(
            f"No policy was measured within {limit:g} ms per prefill on {problem.model.device}. "
            "Raise latency_ms."
        )
    return candidates


def _polish(problem: SearchProblem, scoring: _Scoring, stage: str, most: int) -> None:
    """Try single changes of the best candidate while they help, at most `most` in all."""
    # Attempts that are left.
    left = most
    improved = bool(scoring.candidates)
    while improved and left:
        improved = False
        best = scoring.best
        # However often a candidate was refined, its source names where it came from.
        origin = best.source.removeprefix("refined ")
        for policy in variations(best.policy, problem.sites, problem.visual_tokens):
            # A variation usually breaks a limit. Its counts are fitted to the limits again.
            fitted = problem.fit(policy) if problem.runs(policy) else None
            if fitted is None or scoring.has(fitted):
                continue
            # Only policies that are scored count.
            if not left:
                return
            left -= 1
            loss = scoring.add(f"refined {origin}", fitted)
            scoring.show(stage, most - left, most)
            if loss < best.loss:
                # Start again, with variations of the new best candidate.
                improved = True
                break


class _Scoring:
    """Scores policies in static form and collects them as candidates.

    Args:
        problem: The problem.
        progress: Called as proposals are scored.
    """

    def __init__(self, problem: SearchProblem, progress: Progress | None) -> None:
        self.problem = problem
        self.progress = progress
        self.candidates: list[Candidate] = []

    @property
    def best(self) -> Candidate:
        """Return the candidate with the lowest loss; there must be one."""
        return min(self.candidates, key=lambda candidate: candidate.loss)

    def has(self, policy: Policy) -> bool:
        """Return whether a policy with the same reductions is a candidate already."""
        return any(known.policy.reductions == policy.reductions for known in self.candidates)

    def loss(self, policy: Policy) -> float:
        """Return the loss of a candidate with the same reductions."""
        same = (each for each in self.candidates if each.policy.reductions == policy.reductions)
        return next(same).loss

    def add(self, source: str, policy: Policy) -> float:
        """Score a policy, add it to the candidates and return its loss."""
        loss = self.problem.static_loss(policy)
        cost = self.problem.cost.predict(policy)
        self.candidates.append(Candidate(policy, source, loss, cost))
        return loss

    def add_all(self, stage: str, proposals: Sequence[tuple[str, Policy]]) -> None:
        """Add all proposals that are not candidates yet."""
        for done, (source, policy) in enumerate(proposals, start=1):
            if not self.has(policy):
                self.add(source, policy)
            self.show(stage, done, len(proposals))

    def show(self, stage: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(stage, done, total)


def _relaxed_loss(problem: SearchProblem, policy: Policy) -> float:
    """Return the task loss of a policy in its relaxed form, at the last gate temperature."""
    settings = {"runners_up": _RUNNERS_UP, "gate_temperature": GATE_TEMPERATURES[1]}
    reductions = relaxed(policy, problem.visual_tokens, **settings)
    return problem.mean_loss(lambda batch: relaxed_graph(reductions, batch))
