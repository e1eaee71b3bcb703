"""Tune presets under the limits of a search, for its result to be told from the best of them."""

from __future__ import annotations

from functools import partial

from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import adapted, fitted_preset, fitted_to, preset_tokens
from deos_fx.passes.search.scoring import Scoring
from deos_fx.policy.policy import Policy
from deos_fx.presets.rules import RULES
from deos_fx.presets.tuning import tune

__all__ = ["Rivals"]

# Presets that are tuned: those with the lowest losses in their published settings.
_TUNED = 3


class Rivals:
    """Presets that get the same chances as the search: all are scored, the best three tuned.

    The loss is that of every other candidate.

    Args:
        problem: The problem.
        scoring: Holds the candidates, and takes the presets.
        most: Largest number of losses that are measured.
        seed: Seed of the settings that are tried.
    """

    def __init__(self, problem: SearchProblem, scoring: Scoring, most: int, seed: int) -> None:
        self.problem = problem
        self.scoring = scoring
        self.most = most
        self.seed = seed
        self.evaluations = 0

    def add(self) -> None:
        """Add the presets to the candidates.

        Raises:
            ImportError: If Optuna is not installed.
        """
        # 1. In their published settings.
        losses: dict[str, float] = {}
        for name in RULES:
            if self.evaluations >= self.most:
                break
            policy = fitted_preset(self.problem, name)
            if policy is not None:
                losses[name] = self._loss(f"preset {name}", policy)
        # 2. The best of them with other settings.
        best = sorted(losses, key=losses.__getitem__)[:_TUNED]
        for place, name in enumerate(best):
            # What one leaves of its share is for the others. The published setting is known.
            share = 1 + (self.most - self.evaluations) // (len(best) - place)
            tune(
                name,
                preset_tokens(self.problem),
                evaluate=partial(self._tuned_loss, name),
                evaluations=share,
                seed=self.seed,
                **fitted_to(self.problem),
            )

    def _tuned_loss(self, name: str, policy: Policy) -> float:
        fitted = adapted(self.problem, policy)
        if fitted is None:
            raise ValueError(f"{name} does not meet the limits with this setting")
        return self._loss(f"preset {name}, tuned", fitted)

    def _loss(self, source: str, policy: Policy) -> float:
        """Return the loss of a policy, which becomes a candidate unless it is one."""
        if self.scoring.has(policy):
            return self.scoring.loss(policy)
        self.evaluations += 1
        self.scoring.show("tuned presets", self.evaluations, self.most)
        return self.scoring.add(source, policy)
