"""Score policies in their static form, and try small changes of the best."""

from __future__ import annotations

from collections.abc import Sequence

from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.proposals import variations
from deos_fx.policy.policy import Policy
from deos_fx.results.search_result import Candidate

__all__ = ["Scoring", "polish"]


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


def polish(problem: SearchProblem, scoring: Scoring, stage: str, most: int) -> None:
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
