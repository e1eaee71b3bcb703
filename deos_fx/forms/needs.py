"""Names of the features that a reduction reads."""

from __future__ import annotations

import math

from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.learned import LEARNED
from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.reduction import Reduction

__all__ = ["feature_name", "required_features"]

# Features of the tokens at the site, which are the same whichever block is observed.
_OF_THE_SITE = frozenset(
    {
        "tokens",
        "grid",
        "sides",
        "class_token",
        "text_tokens",
        "text_mask",
        "normed_tokens",
        "normed_text",
    }
)


def required_features(reduction: Reduction) -> frozenset[str]:
    """Return the names of the features that ``static_reduce`` reads for this reduction.

    A feature that is observed at another block than the one before the site ends in the name of
    that place: ``keys@next``, ``attention_cls@vision.5``.
    """
    needs: set[str] = {"tokens"} | ({"class_token"} if reduction.keep_class else set())
    for i, tier in enumerate(reduction.selection):
        selector = SELECTORS[tier.selector]
        names = list(selector.features)
        # The first tier's score is also used after the choice: for weights, and to reweight.
        if selector.ranks or (i == 0 and reduction.uses_scores):
            names += [name for score in tier.scores for name in SCORES[score].features]
        if i == 0:
            names += [name for part in reduction.learned.scores for name in LEARNED[part].needs]
        needs.update(feature_name(name, tier.observe) for name in names)
        # A similarity is observed where the reduction says, whichever tier needs it.
        if selector.compares or (i == 0 and _compares(reduction)):
            kinds = (SIMILARITIES[kind] for kind in reduction.similarity)
            needs.update(feature_name(name, reduction.observe) for name in kinds)
    return frozenset(needs)


def _compares(reduction: Reduction) -> bool:
    """Return whether the assignment compares tokens."""
    # At an infinite temperature, all receivers get equal shares.
    by_likeness = reduction.assignment == "similar" and reduction.temperature != math.inf
    return reduction.gain > 0 and (by_likeness or reduction.assignment == "k_nearest")


def feature_name(name: str, observe: str) -> str:
    """Return a feature's name with its place: ``keys``, ``keys@next``, ``keys@vision.5``."""
    return name if name in _OF_THE_SITE or not observe else f"{name}@{observe}"
