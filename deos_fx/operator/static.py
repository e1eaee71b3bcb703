"""The static form of a reduction: the operators a policy needs, in order, and nothing else.

One composition serves two uses. Called plainly it computes; called with a function that records
``(operator, arguments)`` it writes the same operators into a graph. Parts a reduction does not use
leave no operator: pruning has no assignment, a single score is not standardized just to be ranked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from deos_fx.operator import assign, select, transfer
from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.scores import SCORES, combine, standardize

if TYPE_CHECKING:
    from deos_fx.reduction import Reduction

__all__ = ["StaticOutput", "required_features", "static_reduce"]

Call = Callable[..., Any]
"""Called as ``call(operator, *arguments)``; returns the result, or a graph node standing for it."""
Feature = Callable[[str], Any]
"""Looks a feature up by name."""


class StaticOutput(NamedTuple):
    """Result of ``static_reduce``; the fields are tensors, or graph nodes if the call recorded.

    Attributes:
        tokens: [B, K, d].
        kept: Indices [B, K] into the incoming tokens, ascending.
        mass: [B, K]; None while every mass is 1.
        assignment: P [B or 1, K, V], with whatever goes to the residual token; None for pruning.
        score: [B or 1, V], standardized where that matters; None if the reduction uses no score.
    """

    tokens: Any
    kept: Any
    mass: Any
    assignment: Any
    score: Any


def _execute(operator: Callable[..., Any], *arguments: Any) -> Any:
    return operator(*arguments)


def static_reduce(
    reduction: Reduction,
    count: int,
    tokens: Any,
    mass: Any,
    features: Mapping[str, Any],
    call: Call = _execute,
) -> StaticOutput:
    """Applies a reduction to the visual tokens.

    Args:
        reduction: What to do.
        count: K, tokens to keep per row.
        tokens: Hidden states [B, V, d].
        mass: [B, V], or None if every mass is 1.
        features: What ``required_features(reduction)`` names, except the tokens: ``keys``
            [B, V, Dk]; ``attention_last``, ``attention_text``, ``attention_cls`` [B, V]; ``grid``
            [V, 3] (or [B, V, 3] once tokens were dropped by score). Looked up only when needed, so
            the mapping may make them on demand.
        call: Runs or records an operator. One that records may run operators whose arguments are
            all plain tensors: anchors and grid similarities then become constants.
    """

    def feature(name: str) -> Any:
        return tokens if name == "tokens" else features[name]

    score = _score(reduction, feature, call)
    kept = _select(reduction, count, score, feature, call)
    assignment, gain = _assignment(reduction, score, kept, feature, call)
    weight = None
    if reduction.weighting == "score" and assignment is not None:
        weight = call(transfer.importance, score)
    if assignment is None:
        reduced = call(select.take, tokens, kept)
        mass = None if mass is None else call(select.take, mass, kept)
    else:
        reduced = call(
            transfer.merge, tokens, kept, assignment, mass, weight, gain, reduction.exponent
        )
        mass = call(transfer.merged_mass, kept, assignment, mass, gain)
    if reduction.reweight:
        reduced = call(transfer.reweight, reduced, score, kept, reduction.reweight)
    if _is_constant(reduction):
        kept = call(select.for_each_row, kept, tokens)
        mass = None if mass is None else call(select.for_each_row, mass, tokens)
    return StaticOutput(reduced, kept, mass, assignment, score)


def required_features(reduction: Reduction) -> frozenset[str]:
    """Names of the features that ``static_reduce`` reads for this reduction."""
    needs: set[str] = {"grid"} if reduction.selector == "grid" else set()
    if reduction.uses_scores:
        needs.update(name for score in reduction.scores for name in SCORES[score].needs)
    if reduction.selector == "greedy" or _compares(reduction):
        needs.update(SIMILARITIES[kind] for kind in reduction.similarity)
    return frozenset(needs | {"tokens"})


def _compares(reduction: Reduction) -> bool:
    return reduction.gain > 0 and reduction.temperature != math.inf


def _is_constant(reduction: Reduction) -> bool:
    needs = {name for score in reduction.scores for name in SCORES[score].needs}
    return reduction.selector == "grid" or (reduction.selector == "top_k" and needs == {"grid"})


def _score(reduction: Reduction, feature: Feature, call: Call) -> Any:
    if not reduction.uses_scores:
        return None
    parts = []
    for name in reduction.scores:
        score = SCORES[name]
        parts.append(call(score.function, *map(feature, score.needs)))
    if len(parts) == 1 and not reduction.uses_score_values:
        return parts[0]
    parts = [call(standardize, part) for part in parts]
    if len(parts) == 1:
        return parts[0]
    return call(combine, parts, list(reduction.scores.values()))


def _select(reduction: Reduction, count: int, score: Any, feature: Feature, call: Call) -> Any:
    if reduction.selector == "grid":
        return call(select.grid_anchors, feature("grid"), count)
    if reduction.selector == "top_k":
        return call(select.top_k, score, count)
    similarity = call(assign.similarity, *_compared(reduction, feature))
    return call(select.greedy, score, similarity, count, reduction.diversity)


def _assignment(
    reduction: Reduction, score: Any, kept: Any, feature: Feature, call: Call
) -> tuple[Any, float]:
    """The assignment and the gain to merge with; None if nothing is transferred."""
    assignment = None
    if reduction.gain > 0 and reduction.temperature == math.inf:
        assignment = call(assign.uniform, kept, feature("tokens"))
    elif reduction.gain > 0:
        similarity = call(assign.similarity, *_compared(reduction, feature), kept)
        if reduction.temperature == 0:
            assignment = call(assign.nearest, similarity, kept)
        else:
            assignment = call(assign.soft, similarity, kept, reduction.temperature)
    if reduction.has_rest:
        return call(transfer.residual, score, kept, assignment, reduction.gain), 1.0
    return assignment, reduction.gain


def _compared(reduction: Reduction, feature: Feature) -> tuple[Any, ...]:
    weights = dict(reduction.similarity)
    sources = {kind: feature(name) for kind, name in SIMILARITIES.items() if kind in weights}
    return sources.get("feature"), sources.get("key"), sources.get("grid"), weights
