"""The regimes as they are defined, as ends of what the steps of a search reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deos_fx.policy.policy import Policy

__all__ = ["PRUNE", "in_regimes"]

PRUNE: dict[str, Any] = {
    "gain": 0.0,
    "temperature": 0.0,
    "mass_bias": 0.0,
    "residual": False,
    "weighting": "one",
    "sharpness": 1.0,
}
"""Nothing is left of what is dropped."""
_MERGE: dict[str, Any] = {
    "gain": 1.0,
    "temperature": 0.0,
    "mass_bias": 1.0,
    "weighting": "one",
    "sharpness": 1.0,
}
_REWEIGHT: dict[str, Any] = {"gain": 1.0, "weighting": "score"}
_POOL: dict[str, Any] = {
    **_MERGE,
    "selector": "grid",
    "diversity": 0.0,
    "scores": {},
    "similarity": {"grid": 1.0},
    "learned": {},
}
# The choice of the best tokens, however alike.
_BEST: dict[str, Any] = {"selector": "top_k", "diversity": 0.0}


def in_regimes(policy: Policy) -> Iterator[Policy]:
    """Yield policies with one reduction in a regime as it is defined: the ends of what steps reach.

    Steps mix the regimes, and get slower towards the ends; no step leads to another selector.

    Args:
        policy: The policy.

    Yields:
        Policies whose counts may miss the limits.
    """
    for reduction in policy.reductions:
        choices = [{}, _BEST] if reduction.selector == "greedy" else [{}]
        changes = [how | choice for how in (PRUNE, _MERGE, _REWEIGHT) for choice in choices]
        for change in (*changes, _POOL):
            others = [each for each in policy.reductions if each is not reduction]
            try:
                found = replace(policy, reductions=(*others, replace(reduction, **change)))
            except ValueError:
                # Case: a grid after another selector.
                continue
            if found != policy:
                yield found
