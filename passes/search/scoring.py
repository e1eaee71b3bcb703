"""Score policies in their static form, and try small changes of the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.proposals import variations
from deos_fx.passes.search.towers import before_others
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_result import Candidate

__all__ = ["Scoring", "polish"]


@dataclass
class _Known:
    """What is known of the policies with the same reductions.

    Attributes:
        candidate: The candidate among them.
        on_training_data: Their loss on the data of the steps, if it was measured.
        rejected: Whether they were better on held-back data alone.
    """

    candidate: Candidate | None = None
    on_training_data: float | None = None
    rejected: bool = False


class Scoring:
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
        self._known: dict[tuple[Reduction, ...], _Known] = {}

    @property
    def best(self) -> Candidate:
        """Return the candidate with the lowest loss; there must be one."""
        return min(self.candidates, key=lambda candidate: candidate.loss)

    def has(self, policy: Policy) -> bool:
        """Return whether a policy with the same reductions is a candidate already."""
        return self._of(policy).candidate is not None

    def has_rejected(self, policy: Policy) -> bool:
        """Return whether a policy with the same reductions was not confirmed."""
        return self._of(policy).rejected

    def loss(self, policy: Policy) -> float:
        """Return the loss of the candidate with the same reductions; there must be one."""
        candidate = self._of(policy).candidate
        assert candidate is not None
        return candidate.loss

    def measure(self, policy: Policy) -> float:
        """Return the loss of a policy on held-back data."""
        return self.estimate.of_loss(lambda: self.problem.static_loss(policy))

    def add(self, source: str, policy: Policy, loss: float | None = None) -> float:
        """Add a policy to the candidates and return its loss, which is measured if not given."""
        if loss is None:
            loss = self.measure(policy)
        candidate = Candidate(policy, source, loss, self.problem.cost.predict(policy))
        self.candidates.append(candidate)
        self._of(policy).candidate = candidate
        return loss

    def confirms(self, policy: Policy, than: Policy) -> bool:
        """Return whether a policy is better than another on the data of the steps as well.

        Of many changes, one looks better on little held-back data by chance.
        """
        better = self._on_training_data(policy) < self._on_training_data(than)
        self._of(policy).rejected |= not better
        return better

    def on_all_data(self, policy: Policy) -> float:
        """Return the mean loss of a policy on held-back data and on the data of the steps.

        Held-back data is little: of policies at different places, it often prefers the wrong one.
        """
        loss = self.loss(policy) if self.has(policy) else self.measure(policy)
        own, others = len(self.problem.scoring), len(self.problem.training)
        return (own * loss + others * self._on_training_data(policy)) / (own + others)

    def _on_training_data(self, policy: Policy) -> float:
        """Return the loss of a policy on the data of the steps.

        Batches where it is not a number are left out, as they are by the steps.
        """
        known = self._of(policy)
        if known.on_training_data is None:
            on_steps = replace(self.problem, scoring=self.problem.training)
            losses = [loss for loss in on_steps.static_losses(policy) if math.isfinite(loss)]
            known.on_training_data = statistics.fmean(losses) if losses else math.inf
        return known.on_training_data

    def _of(self, policy: Policy) -> _Known:
        return self._known.setdefault(policy.reductions, _Known())

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


def polish(
    problem: SearchProblem,
    scoring: Scoring,
    stage: str,
    evaluations: int,
    tried: Sequence[Site] = (),
) -> None:
    """Try single changes of the best candidates, as long as evaluations are left.

    A change that helps is varied next. Where none does, it is the turn of the next best candidate.

    Args:
        problem: The problem.
        scoring: Holds the candidates, and takes the new ones.
        stage: What to call it when progress is reported.
        evaluations: Forward passes of a batch that may be spent.
        tried: Sites of the tower where a reduction may come before all others.
    """
    end = problem.effort.evaluations + evaluations
    # A comparison on the data of the steps, of two policies.
    confirmation = 2 * len(problem.training)
    # Places of the candidates whose changes have all been tried.
    done: set[int] = set()
    while True:
        open_places = [i for i in range(len(scoring.candidates)) if i not in done]
        if not open_places:
            return
        place = min(open_places, key=lambda i: scoring.candidates[i].loss)
        start = scoring.candidates[place]
        # However often a candidate was refined, its source names where it came from.
        source = f"refined {start.source.removeprefix('refined ')}"
        whole = problem.visual_tokens
        further = before_others(start.policy, tried, whole)
        for policy in chain(further, variations(start.policy, problem.sites, whole)):
            # A variation usually breaks a limit. Its counts are fitted to the limits again.
            fitted = problem.fit(policy) if problem.runs(policy) else None
            if fitted is None or scoring.has(fitted) or scoring.has_rejected(fitted):
                continue
            left = end - problem.effort.evaluations - len(problem.scoring)
            if left < 0:
                return
            loss = scoring.measure(fitted)
            if loss < start.loss:
                # Case: better, perhaps by chance.
                if left < confirmation:
                    return
                if not scoring.confirms(fitted, start.policy):
                    continue
            scoring.add(source, fitted, loss)
            scoring.show(stage, evaluations - left, evaluations)
            if loss < start.loss:
                break
        else:
            done.add(place)
