"""One step of a selection, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.validate import (
    check_diversity,
    check_keep,
    check_observe,
    normal_weights,
    other_options,
)

__all__ = ["Tier", "checked_tier", "described", "given_fields", "mix_in_words"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Tier:
    """One step of a selection: it adds tokens to those that earlier tiers chose.

    Attributes:
        keep: Tokens it chooses: a number, or a fraction of all that the reduction keeps, rounded
            up. The first tier chooses the remaining number.
        selector: Name of a row of ``operator.SELECTORS``.
        scores: As in `Reduction`.
        diversity: As in `Reduction`.
        options: As in `Reduction`.
        observe: As in `Reduction`.
    """

    keep: int | float = 0
    selector: str = "top_k"
    scores: Mapping[str, float] = field(default_factory=dict)
    diversity: float = 0.0
    options: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    observe: str = ""

    @property
    def mixes(self) -> bool:
        """Return whether the values of its score matter in addition to their order."""
        return self.selector == "greedy"

    def count(self, total: int) -> int:
        """Return how many tokens it chooses in a reduction that keeps ``total``."""
        if isinstance(self.keep, int):
            return self.keep
        return math.ceil(self.keep * total - 1e-9)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in given_fields(self).items())
        return f"Tier({given})"


def checked_tier(site: str, tier: object, score: str) -> Tier:
    """Check a further tier of a reduction, and complete its scores and options.

    Args:
        site: The site of the reduction.
        tier: What was given as a tier.
        score: The score to rank by if none is given.

    Raises:
        TypeError: If it is not a tier, or a field has a wrong type.
        ValueError: If a field is unknown or out of range.
    """
    if not isinstance(tier, Tier):
        raise TypeError(f"{site}: tiers has {tier!r}; give Tier(keep=..., selector=...)")
    if tier.selector not in SELECTORS:
        raise ValueError(
            f"{site}: selector is {tier.selector!r}; choose from {', '.join(SELECTORS)}"
        )
    check_keep(f"{site}: a tier", tier.keep)
    scores = normal_weights(f"{site}: scores", tier.scores, SCORES)
    if not scores and SELECTORS[tier.selector].ranks:
        scores = {score: 1.0}
    check_diversity(site, tier.selector, tier.diversity)
    check_observe(site, tier.observe)
    options = other_options(site, tier.selector, scores, tier.options)
    return replace(tier, scores=scores, options=options)


def given_fields(item: Any) -> dict[str, Any]:
    """Return the fields and options that differ from their defaults, without the tiers."""
    values = {entry.name: getattr(item, entry.name) for entry in fields(item)}
    given = {
        entry.name: values[entry.name]
        for entry in fields(item)
        if entry.name not in ("tiers", "options") and values[entry.name] != _default(entry)
    }
    if item.options:
        given["options"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in item.options.items()
        }
    return {"keep": item.keep} | given if isinstance(item, Tier) else given


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def described(tier: Tier) -> str:
    """Describe a tier in words: its selector, its scores, and where they are observed."""
    selector = SELECTORS[tier.selector]
    words = tier.selector
    if selector.ranks:
        words += f" by {mix_in_words(tier.scores)}"
    if tier.observe:
        words += f" of {'the next block' if tier.observe == 'next' else tier.observe}"
    return words


def mix_in_words(weights: Mapping[str, float]) -> str:
    """Describe weights by name, such as those of scores."""
    if len(weights) == 1:
        return next(iter(weights))
    return " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())
