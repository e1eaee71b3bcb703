"""A search under way: where to reduce, how many to keep, how to treat the rest, by gradient.

The model is frozen. At a few places where the limits can be met, the parameters of a reduction are
trained on its relaxed form: scores, learned directions, and what happens to dropped tokens. A few
steps show which place is best; there, training goes on. Limits under which next to nothing can be
answered are approached from looser ones. Presets, fitted to the same limits, and small changes of
the best candidate are tried as well. All candidates are scored in *static* form, the form that is
deployed, on held-back data, and the best is returned. If asked to, presets are tuned at the end,
which tells what the search has gained over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search import processes
from deos_fx.passes.search.checkpoints import Checkpoints
from deos_fx.passes.search.choice import charged, descended, finalists
from deos_fx.passes.search.descent import Descent, site_tokens
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.outcome import RUNNERS_UP, check_unreduced, result_of
from deos_fx.passes.search.places import factors, nearby, placed, placements, widened
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.proposals import PRESETS, discretise, from_presets
from deos_fx.passes.search.regimes import in_regimes
from deos_fx.passes.search.rivals import Rivals
from deos_fx.passes.search.scoring import Scoring, polish
from deos_fx.passes.search.space import relaxed, start_reduction
from deos_fx.passes.search.state import SearchState
from deos_fx.passes.search.towers import in_towers
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_result import SearchResult

__all__ = ["JUDGED", "STAGES", "SearchRun"]

# Steps at each place, if there are several; the best single site and so many pairs go on for a
# third of all steps.
_TRIAL, _PAIRS = 24, 3
_CHECKPOINT_EVERY = 10
# How many regimes as they are defined one site can be in.
_REGIMES = 7
# Of those that look better, so many are looked at twice.
_CHECKED = 3
# Small changes of the best candidate, at the end: evaluations in units of a held-back loss. Those
# that look better are looked at again, on the data of the steps.
_VARIATIONS = 40
JUDGED = 9
"""How often a descent measures the static loss."""
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
        checkpoint: Where the states of the steps are saved.
        progress: Called as the search advances.
        descents: The descents so far, the last one the present one.
        winner: Those at the best place, after all places were compared.
        interrupted: Whether it was cut short.
        reached: Where looser budgets have ended, at each place; starts of the steps.
        further: How many tighter budgets come after this one.
        estimate: Says how long the search takes; one for all budgets.
        preset_evaluations: Losses that may be spent on presets and their options at the end.
    """

    problem: SearchProblem
    steps: int
    seed: int
    checkpoint: Checkpoints | None
    progress: Progress | None
    descents: list[Descent] = field(default_factory=list)
    winner: list[Descent] = field(default_factory=list)
    interrupted: bool = False
    reached: Sequence[Policy] = ()
    further: int = 0
    estimate: Estimate | None = None
    preset_evaluations: int = 0

    def __post_init__(self) -> None:
        self.estimated = self.estimate or Estimate(self.progress)
        self.scoring = Scoring(self.problem, self.estimated, self.progress)
        self.rivals = Rivals(self.problem, self.scoring, self.preset_evaluations, self.seed)
        self.unreduced_loss: float | None = None
        # Under several budgets, others run the model before and after.
        self.before = self.after = self.problem.effort.evaluations
        # Steps and static losses of the search, for the estimate.
        self.left = (0, 0)
        self.interrupted |= self.problem.interrupted

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the steps at the best place; of an interrupted search, those at the last place."""
        entries = [entry for descent in self.winner for entry in descent.state.history]
        if not entries and self.descents:
            entries = self.descents[-1].state.history
        return [{**entry, "step": i} for i, entry in enumerate(entries, start=1)]

    @property
    def spent(self) -> int:
        """Return the evaluations of the stages so far, but for those of the presets at the end."""
        return self.after - self.before - self.rivals.evaluations * len(self.problem.scoring)

    def advance(self, stages: Sequence[str] = STAGES, most: int | None = None) -> None:
        """Go through the stages of the search, until the end or an interruption.

        Args:
            stages: Those of `STAGES` that are not left out.
            most: Largest number of evaluations of variations; left out, those of a search.
        """
        most = _VARIATIONS * len(self.problem.scoring) if most is None else most
        # Groups of patches have no relaxed form: there, settings are only tried.
        found = self.problem.searched_sites()
        tried = [site for site in found if self.problem.sites.in_groups(site.name)]
        sites = [site for site in found if site not in tried]
        try:
            if self.interrupted:
                # Case: while capturing, or under a looser budget.
                stages = ()
            if "presets" in stages:
                self.unreduced_loss = check_unreduced(self.problem)
                self.scoring.add_all("presets", _known(self.problem))
                self.scoring.add_all("tower", in_towers(self.problem, tried))
            if "steps" in stages:
                starts = self.carried()
                if starts:
                    # What comes from a looser budget is half done.
                    self.steps, most = max(1, self.steps // 2), most // 2
                self.train(starts or self.places(sites), sites)
            if "variations" in stages:
                polish(self.problem, self.scoring, "variations", most, tried)
            if "variations" in stages and self.preset_evaluations:
                # After all that the search does, which they leave as it is.
                self.rivals.add()
        except KeyboardInterrupt:
            # The user wants a result now.
            self.interrupted = True
        self.round_up(sites)
        self.after = self.problem.effort.evaluations

    def score_alone(self, source: str) -> None:
        """Score the model without a reduction, in place of a search.

        Args:
            source: What the candidate is called.
        """
        self.unreduced_loss = self.scoring.add(source, Policy())
        self.after = self.problem.effort.evaluations

    def carried(self) -> list[Policy]:
        """Return the best of what looser budgets have reached, fitted to this one, if any fits.

        All that fit are candidates, too.
        """
        fitted = [self.problem.fit(policy) for policy in self.reached]
        found = [policy for policy in fitted if policy is not None and policy.reductions]
        for policy in found:
            if not self.scoring.has(policy):
                self.scoring.add("carried from a looser budget", policy)
        losses = [charged(self.scoring.loss(each), len(each.reductions)) for each in found]
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

    def train(self, starts: Sequence[Policy], sites: Sequence[Site]) -> None:
        """Try every place for a few steps, the best for some more, and train on at the winner.

        Args:
            starts: What the steps start from, at each place.
            sites: Sites to which the last site of the best place may move.
        """
        if not starts:
            return
        self.left = self._planned(len(starts), len(sites))
        if len(starts) > 1:
            tried = self._each("place", starts, _TRIAL)
            moved = self.moved(min(tried, key=descended), sites)
            starts = [self.rounded(descent) for descent in finalists(tried, moved, _PAIRS)]
        if len(starts) > 1:
            # What loses on all data is no candidate, however low its loss on held-back data.
            tried = self._each("finalist", starts, self.steps // 3)
            best = min(tried, key=self._on_all_data)
            self.score(best)
            starts = [self.rounded(best)]
        (start,) = starts
        looser = factors(self.problem, start, self.steps)
        share = self.steps // len(looser)
        for factor in looser:
            # The limits themselves come last, and get what is left of the steps.
            stage = "steps" if factor == 1 else f"steps at {factor} times the tokens"
            steps = share if factor > 1 else self.steps - share * (len(looser) - 1)
            self.winner.append(self.descend(stage, start, steps, factor))
            start = self.rounded(self.winner[-1])
        settled = self.settled(start)
        if settled != start:
            # Case: in another regime there is more to gain.
            self.settled(self.rounded(self.descend("regime", settled, max(1, self.steps // 2))))

    def _on_all_data(self, descent: Descent) -> float:
        """Return the loss on all data of the best that a descent has reached, with the charge."""
        policy = self.rounded(descent)
        return charged(self.scoring.on_all_data(policy), len(policy.reductions))

    def _each(self, kind: str, starts: Sequence[Policy], steps: int) -> list[Descent]:
        """Take so many steps from each start, at most as many as the search takes."""
        few = max(1, min(steps, self.steps))
        return [
            self._descend(f"{kind} {i + 1} of {len(starts)}", start, few)
            for i, start in enumerate(starts)
        ]

    def moved(self, best: Descent, sites: Sequence[Site]) -> list[Descent]:
        """Move the last site of a place, by ever shorter distances, and return what was tried.

        Args:
            best: The best place so far.
            sites: The sites, in order of depth.
        """
        seen = [list(descent.reductions) for descent in self.descents]
        found: list[Descent] = []
        distance = len(sites) // 4
        while distance:
            near = nearby(list(best.reductions), sites, distance)
            new = [names for names in near if names not in seen]
            seen += new
            starts = [start for names in new if (start := self._start(names)) is not None]
            near_to = f"place {distance} from {' and '.join(best.reductions)},"
            found += self._each(near_to, starts, _TRIAL)
            better = min([best, *found], key=descended)
            # As far again in the direction that helps, or half as far.
            distance = distance // 2 if better is best else distance
            best = better
        return found

    def _start(self, names: Sequence[str]) -> Policy | None:
        """Return the start of the steps at a place, if there can be one."""
        starts = self._starts([self.problem.sites[name] for name in names])
        return placed(self.problem, [starts[name] for name in names])

    def settled(self, policy: Policy) -> Policy:
        """Return a policy, or the same in a regime as it is defined, if that is better."""
        problem, scoring, source = self.problem, self.scoring, _source(policy)
        if not scoring.has(policy):
            scoring.add(source, policy)
        fitted = [problem.fit(each) for each in in_regimes(policy) if problem.runs(each)]
        losses = [(scoring.measure(each), each) for each in fitted if each is not None]
        better = [pair for pair in losses if pair[0] < scoring.loss(policy)]
        for loss, each in sorted(better, key=lambda pair: pair[0])[:_CHECKED]:
            if scoring.confirms(each, policy):
                if not scoring.has(each):
                    scoring.add(source, each, loss)
                return each
        return policy

    def descend(self, stage: str, start: Policy, steps: int, factor: int = 1) -> Descent:
        """Take gradient steps from a policy, and score what they reach.

        Args:
            stage: What to call it.
            start: The policy.
            steps: Number of steps.
            factor: By how much its counts are multiplied first, and the limits raised.
        """
        descent = self._descend(stage, start, steps, factor)
        self.score(descent)
        return descent

    def _descend(self, stage: str, start: Policy, steps: int, factor: int = 1) -> Descent:
        """Take gradient steps from a policy; see `descend`."""
        problem, start = widened(self.problem, start, factor)
        settings = {
            "steps": steps,
            "seed": self.seed,
            "limits": problem.limits,
            "start": [str(reduction) for reduction in start.reductions],
            **problem.fingerprint(),
        }
        reductions = relaxed(start, problem.visual_tokens, runners_up=RUNNERS_UP)
        state = SearchState.start(reductions, AugmentedLagrangian(problem.limits), settings)
        descent = Descent(problem, state, steps, self.seed)
        self.descents.append(descent)
        saved = None if self.checkpoint is None else self.checkpoint.within(stage)
        # Steps that were stopped go on with their parameters, optimizer, multipliers and history.
        if saved is not None:
            state.resume(saved.folder)
            descent.recount()
            processes.check_equal(f"steps in the checkpoint {saved.folder}", state.step)

        def after_step(done: int) -> None:
            # Only whole steps are saved: what ends a search may come in the middle of one.
            whole = done % _CHECKPOINT_EVERY == 0 or done == steps
            if saved is not None and whole and processes.is_main():
                saved.save(state)
            self.estimated.tell(descent.seconds, *self.left)
            self.scoring.show(stage, done, steps)

        descent.run(after_step)
        return descent

    def rounded(self, descent: Descent) -> Policy:
        """Return the best policy that a descent has reached, fitted to the limits."""
        descent.state.take_best()
        whole = self.problem.visual_tokens
        policy = discretise(descent.reductions, whole)
        if not policy.reductions:
            # Case: under wider limits every site kept nearly all. The limits say how many may stay.
            reductions = descent.reductions.items()
            policy = Policy(tuple(each.to_reduction(site, whole) for site, each in reductions))
        return self.problem.fit(policy) or policy

    def score(self, descent: Descent) -> None:
        """Add what a descent has reached to the candidates."""
        policy = self.rounded(descent)
        if self.problem.meets(policy) and not self.scoring.has(policy):
            self.scoring.add(_source(policy), policy)

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
        before = self.problem.effort.evaluations
        if self.unreduced_loss is None:
            self.unreduced_loss = check_unreduced(self.problem)
        found = result_of(
            self.problem,
            self.scoring.candidates,
            self.history,
            self.unreduced_loss,
            self.interrupted,
        )
        # The relaxed loss of what won is told as well.
        spent = self.spent + self.problem.effort.evaluations - before
        return replace(found, evaluations=spent, preset_evaluations=self.rivals.evaluations)

    def _planned(self, places: int, sites: int) -> tuple[int, int]:
        """Return how many steps and static losses the search takes, from the first step on.

        If places near the best are no better, and another regime is worth steps.
        """
        # Under a tighter budget, and under this one.
        steps, losses = self.steps // 2, JUDGED + _VARIATIONS // 2 + len(PRESETS)
        losses += self.preset_evaluations
        steps, losses = self.further * steps, self.further * losses + self.preset_evaluations
        if places > 1:
            # The best of the places near it may go on beside those that were tried first.
            finalists = min(places + 1, 1 + _PAIRS)
            # On both sides of the best place, at distances that halve.
            tried = places + 2 * (sites // 4).bit_length()
            steps += tried * min(_TRIAL, self.steps) + finalists * (self.steps // 3)
            losses += (tried + finalists) * JUDGED
            # In the end, finalists are compared on the data of the steps as well.
            losses += finalists * len(self.problem.training) // len(self.problem.scoring)
        steps += self.steps + self.steps // 2
        return steps, losses + 2 * JUDGED + _REGIMES + _VARIATIONS


def _source(policy: Policy) -> str:
    """Return the origin of a policy that steps have reached."""
    return f"gradient at {' and '.join(reduction.site for reduction in policy.reductions)}"
