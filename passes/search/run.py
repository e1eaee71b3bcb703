"""A search under way: where to reduce, how many to keep, how to treat the rest, by gradient.

The model is frozen. At a few places where the limits can be met, the parameters of a reduction are
trained on its relaxed form: scores, learned directions, and what happens to dropped tokens. A few
steps show which place is best; there, training goes on. Presets, fitted to the same limits, and
small changes of the best candidate are tried as well. All candidates are scored in *static* form,
the form that is deployed, on held-back data, and the best is returned.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search import processes
from deos_fx.passes.search.descent import Descent, site_tokens
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.outcome import RUNNERS_UP, check_unreduced, result_of
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.proposals import (
    PRESETS,
    discretise,
    from_presets,
    placements,
    variations,
)
from deos_fx.passes.search.space import relaxed, start_reduction
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_result import Candidate, SearchResult

__all__ = ["STAGES", "SearchRun"]

# Steps at each place, if there are several; the best so many go on for a third of all steps.
_TRIAL, _FINALISTS = 24, 2
# What a site has to earn: the loss of a place counts so much more for each site after the first.
_CHARGE = 0.05
_CHECKPOINT_EVERY = 10
# How often a descent measures the static loss.
_JUDGED = 9
# Small changes of the best candidate, at the end.
_VARIATIONS = 24
STAGES = ("presets", "steps", "variations")
"""What a search does, in this order."""


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
        reached: Where looser budgets have ended, at each place; starts of the steps.
        further: How many tighter budgets come after this one.
        estimate: Says how long the search takes; one for all budgets.
    """

    problem: SearchProblem
    steps: int
    seed: int
    checkpoint: str | os.PathLike[str] | None
    progress: Progress | None
    descents: list[Descent] = field(default_factory=list)
    interrupted: bool = False
    reached: Sequence[Policy] = ()
    further: int = 0
    estimate: Estimate | None = None

    def __post_init__(self) -> None:
        self.estimated = self.estimate or Estimate(self.progress)
        self.scoring = _Scoring(self.problem, self.estimated, self.progress)
        self.unreduced_loss: float | None = None
        # Steps and static losses of the search, for the estimate.
        self.left = (0, 0)
        self.interrupted |= self.problem.interrupted

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the steps at the best place; of an interrupted search, those at the last place."""
        return self.descents[-1].state.history if self.descents else []

    def advance(
        self, sites: Sequence[Site], stages: Sequence[str] = STAGES, most: int | None = None
    ) -> None:
        """Go through the stages of the search, until the end or an interruption.

        Args:
            sites: The sites to search.
            stages: Those of `STAGES` that are not left out.
            most: Largest number of variations; left out, as many as a search tries by default.
        """
        most = _VARIATIONS if most is None else most
        try:
            if self.interrupted:
                # Case: while capturing, or under a looser budget.
                stages = ()
            if "presets" in stages:
                self.unreduced_loss = check_unreduced(self.problem)
                self.scoring.add_all("presets", _known(self.problem))
            if "steps" in stages:
                starts = self.carried()
                if starts:
                    # What comes from a looser budget is half done.
                    self.steps, most = max(1, self.steps // 2), most // 2
                self.train(starts or self.places(sites))
            if "variations" in stages:
                _polish(self.problem, self.scoring, "variations", most)
        except KeyboardInterrupt:
            # The user wants a result now.
            self.interrupted = True
        self.round_up(sites)

    def carried(self) -> list[Policy]:
        """Return the best of what looser budgets have reached, fitted to this one, if any fits.

        All that fit are candidates, too.
        """
        fitted = [self.problem.fit(policy) for policy in self.reached]
        found = [policy for policy in fitted if policy is not None and policy.reductions]
        for policy in found:
            if not self.scoring.has(policy):
                self.scoring.add("carried from a looser budget", policy)
        losses = [
            _charged(each.loss, len(policy.reductions))
            for policy in found
            for each in self.scoring.candidates
            if each.policy.reductions == policy.reductions
        ]
        return [found[losses.index(min(losses))]] if found else []

    def at_places(self) -> list[Policy]:
        """Return the policy that the steps have reached last at each place."""
        last = {tuple(descent.reductions): descent for descent in self.descents}
        return [self.rounded(descent) for descent in last.values()]

    def places(self, sites: Sequence[Site]) -> list[Policy]:
        """Return the starts of the steps at every place that is tried."""
        return placements(self.problem, sites, self._starts)

    def _starts(self, sites: Sequence[Site]) -> dict[str, Reduction]:
        """Return what the steps start from at some sites, by name."""
        tokens = site_tokens(self.problem, sites)
        return {site.name: start_reduction(site, tokens[site.name]) for site in sites}

    def train(self, starts: Sequence[Policy]) -> None:
        """Try every place for a few steps, the best for some more, and train on at the winner."""
        self.left = self._planned(len(starts))
        for kind, steps in (("place", _TRIAL), ("finalist", self.steps // 3)):
            if len(starts) > 1:
                stages = [f"{kind} {i + 1} of {len(starts)}" for i in range(len(starts))]
                tried = [
                    self.descend(stage, start, max(1, min(steps, self.steps)))
                    for stage, start in zip(stages, starts, strict=True)
                ]
                tried = sorted(tried, key=_descended)[: _FINALISTS if kind == "place" else 1]
                starts = [self.rounded(descent) for descent in tried]
        for start in starts:
            self.descend("steps", start, self.steps)

    def descend(self, stage: str, start: Policy, steps: int) -> Descent:
        """Take gradient steps from a policy, and score what they reach."""
        settings = {
            "steps": steps,
            "seed": self.seed,
            "limits": self.problem.limits,
            "start": [str(reduction) for reduction in start.reductions],
            **self.problem.fingerprint(),
        }
        reductions = relaxed(start, self.problem.visual_tokens, runners_up=RUNNERS_UP)
        state = SearchState.start(reductions, AugmentedLagrangian(self.problem.limits), settings)
        descent = Descent(self.problem, state, steps, self.seed)
        self.descents.append(descent)
        folder = None if self.checkpoint is None else Path(self.checkpoint) / stage
        # Steps that were stopped go on with their parameters, optimizer, multipliers and history.
        if folder is not None:
            state.resume(folder)
            processes.check_equal(f"steps in the checkpoint {folder}", state.step)

        def after_step(done: int) -> None:
            # Only whole steps are saved: what ends a search may come in the middle of one.
            whole = done % _CHECKPOINT_EVERY == 0 or done == steps
            if folder is not None and whole and processes.is_main():
                state.save(folder)
            self.estimated.tell(descent.seconds, *self.left)
            self.scoring.show(stage, done, steps)

        descent.run(after_step)
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

    def round_up(self, sites: Sequence[Site]) -> None:
        """Score what an interruption has left."""
        for descent in self.descents if self.interrupted else ():
            self.score(descent)
        if self.interrupted and not self.scoring.candidates:
            # Case: interrupted before anything was scored. A preset, or a start of the steps.
            known = _known(self.problem) or [("start", start) for start in self.places(sites)]
            self.scoring.add_all("presets", known[:1])

    def result(self) -> SearchResult:
        """Return the result of what was found."""
        try:
            return self._result()
        except KeyboardInterrupt:
            # Once more: what was found is not lost because it was about to be returned.
            self.interrupted = True
            return self._result()

    def _result(self) -> SearchResult:
        if self.unreduced_loss is None:
            self.unreduced_loss = check_unreduced(self.problem)
        candidates, interrupted = self.scoring.candidates, self.interrupted
        return result_of(self.problem, candidates, self.history, self.unreduced_loss, interrupted)

    def _planned(self, places: int) -> tuple[int, int]:
        """Return how many steps and static losses the search takes, from the first step on."""
        # Under a tighter budget, and under this one.
        steps, losses = self.steps // 2, _JUDGED + _VARIATIONS // 2 + len(PRESETS)
        steps, losses = self.further * steps, self.further * losses
        if places > 1:
            finalists = min(places, _FINALISTS)
            steps += places * min(_TRIAL, self.steps) + finalists * (self.steps // 3)
            losses += (places + finalists) * _JUDGED
        return steps + self.steps, losses + _JUDGED + _VARIATIONS


# *** the choice ***


def _charged(loss: float, sites: int) -> float:
    """Return a loss with a charge for every site but the first."""
    return loss * (1 + _CHARGE * (sites - 1))


def _descended(descent: Descent) -> float:
    """Return the loss that a descent has reached, with the charge for its sites."""
    return _charged(descent.state.best_loss, len(descent.reductions))


def _polish(problem: SearchProblem, scoring: _Scoring, stage: str, most: int) -> None:
    """Try single changes of the best candidates, `most` in all.

    A change that helps is varied next. Where none does, it is the turn of the next best candidate.
    """
    # Attempts that are left, and places of the candidates whose changes have all been tried.
    left = most
    tried: set[int] = set()
    while left:
        open_places = [i for i in range(len(scoring.candidates)) if i not in tried]
        if not open_places:
            return
        place = min(open_places, key=lambda i: scoring.candidates[i].loss)
        start = scoring.candidates[place]
        # However often a candidate was refined, its source names where it came from.
        origin = start.source.removeprefix("refined ")
        for policy in variations(start.policy, problem.sites, problem.visual_tokens):
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
            if loss < start.loss:
                break
        else:
            tried.add(place)


class _Scoring:
    """Scores policies in static form and collects them as candidates.

    Args:
        problem: The problem.
        estimate: Measures how long that takes.
        progress: Called as proposals are scored.
    """

    def __init__(
        self, problem: SearchProblem, estimate: Estimate, progress: Progress | None
    ) -> None:
        self.problem = problem
        self.estimate = estimate
        self.progress = progress
        self.candidates: list[Candidate] = []

    @property
    def best(self) -> Candidate:
        """Return the candidate with the lowest loss; there must be one."""
        return min(self.candidates, key=lambda candidate: candidate.loss)

    def has(self, policy: Policy) -> bool:
        """Return whether a policy with the same reductions is a candidate already."""
        return any(known.policy.reductions == policy.reductions for known in self.candidates)

    def add(self, source: str, policy: Policy) -> float:
        """Score a policy, add it to the candidates and return its loss."""
        loss = self.estimate.of_loss(lambda: self.problem.static_loss(policy))
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
