"""The settings that a hand can turn, as a space for optimisers that know no gradient.

Everything that the gradient trains is in it except the learned directions: a hundred numbers each
that mean nothing one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deos_fx.operator import SCORES
from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import site_order

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

__all__ = ["MERGE", "START", "HandSpace"]

# A score with a smaller weight is left out, and a smaller gain is none.
_NEGLIGIBLE = 0.05
_TEMPERATURES = {"nearest": 0.0, "uniform": math.inf}

START: dict[str, Any] = {
    "score cls_attention": 1.0,
    "score text_relevance": 0.5,
    "selector": "greedy",
    "diversity": 4.0,
    "gain": 0.88,
    "assignment": "soft",
    "temperature": 0.05,
    "similarity": "feature",
    "weighting": "score",
    "sharpness": 3.0,
    "mass_bias": 0.9,
}
"""Where the gradient starts at the projector, without its learned parts."""
MERGE: dict[str, Any] = {
    "score cls_attention": 1.0,
    "score text_relevance": 0.0,
    "selector": "top_k",
    "diversity": 1.0,
    "gain": 1.0,
    "assignment": "nearest",
    "temperature": 0.05,
    "similarity": "feature",
    "weighting": "one",
    "sharpness": 1.0,
    "mass_bias": 1.0,
}
"""The preset `merge`, the strongest of the published ones on the reference task."""


class HandSpace:
    """One or two sites, and one treatment for both.

    Args:
        problem: The problem; policies are fitted to its limits.
        sites: The sites, in order of depth.
    """

    def __init__(self, problem: SearchProblem, sites: Sequence[Site]) -> None:
        self.problem = problem
        self.sites = {site.name: site for site in sites}
        plain = {"scores": {"feature_norm": 1.0}}
        self.first = [
            name
            for name in self.sites
            if problem.fit(Policy((Reduction(name, 1, **plain),))) is not None
        ]
        # What the search tries as well, and the likeness to the question.
        known = {score for site in sites for score in site.scores}
        self.scores = [
            name
            for name, score in SCORES.items()
            if name in known and (score.searched or name == "text_relevance")
        ]

    def start(self, values: dict[str, Any]) -> dict[str, Any]:
        """Complete the values of a known setting, such as `START`, to a point of the space."""
        others = {f"score {name}": 0.0 for name in self.scores}
        return {"site": self.first[0], "second": "none", "share": 2.0, **others, **values}

    def suggest(self, trial: BaseTrial) -> Policy | None:
        """Return the policy of a trial, fitted to the limits; None if there is no such policy.

        All settings are asked for at every trial, also those that have no effect, since samplers
        of a population need a space that stays the same.
        """
        first = trial.suggest_categorical("site", self.first)
        second = trial.suggest_categorical("second", ["none", *list(self.sites)[1:]])
        share = trial.suggest_float("share", 1.0, 4.0, log=True)
        weights = {name: trial.suggest_float(f"score {name}", 0.0, 1.0) for name in self.scores}
        settings = self._settings(trial)
        fitted = self.problem.fit(Policy((self._reduction(first, 1, weights, settings),)))
        assert fitted is not None
        policies = fitted
        if second != "none" and site_order(second) > site_order(first):
            # Case: the first site keeps more than it would alone, so that the second has a part.
            alone = fitted.reductions[0].count(self.problem.visual_tokens)
            count = min(self.problem.visual_tokens, round(share * alone))
            later = max(1, round(alone / share))
            pair = (
                self._reduction(first, count, weights, settings),
                self._reduction(second, later, weights, settings),
            )
            policies = self.problem.fit(Policy(pair))
        return policies if policies is not None and self.problem.runs(policies) else None

    def _settings(self, trial: BaseTrial) -> dict[str, Any]:
        """Ask for everything but places and scores."""
        selector = trial.suggest_categorical("selector", ["top_k", "greedy", "max_min", "grid"])
        diversity = trial.suggest_float("diversity", 0.1, 16.0, log=True)
        gain = trial.suggest_float("gain", 0.0, 1.0)
        assignment = trial.suggest_categorical("assignment", ["nearest", "soft", "uniform"])
        temperature = trial.suggest_float("temperature", 1e-3, 1.0, log=True)
        kind = trial.suggest_categorical("similarity", ["feature", "centred", "key", "grid"])
        weighting = trial.suggest_categorical("weighting", ["one", "score"])
        sharpness = trial.suggest_float("sharpness", 0.3, 10.0, log=True)
        return {
            "selector": selector,
            "diversity": diversity if selector == "greedy" else 0.0,
            "gain": gain if gain > _NEGLIGIBLE else 0.0,
            "temperature": _TEMPERATURES.get(assignment, temperature),
            "similarity": {kind: 1.0},
            "weighting": weighting,
            "sharpness": sharpness if weighting == "score" else 1.0,
            "mass_bias": trial.suggest_float("mass_bias", 0.0, 2.0),
        }

    def _reduction(
        self, site: str, keep: int, weights: dict[str, float], settings: dict[str, Any]
    ) -> Reduction:
        """Make a reduction with the scores that a site has."""
        own = self.sites[site].scores
        scores = {name: w for name, w in weights.items() if name in own and w > _NEGLIGIBLE}
        return Reduction(site, keep, scores=scores or {"novelty": 1.0}, **settings)
