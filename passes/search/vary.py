"""Small variations of a policy, to polish the best candidates in their static form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deos_fx.operator import SCORES
from deos_fx.passes.analyse.find_sites import Sites
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction, split_site

__all__ = ["variations"]

# One change at a time; counts are fitted to the limits again afterwards.
_TREATMENTS: tuple[dict[str, Any], ...] = (
    {"gain": 0.0, "temperature": 0.0, "mass_bias": 0.0, "residual": False, "weighting": "one"},
    {"gain": 1.0, "temperature": 0.0, "mass_bias": 1.0},
    {"gain": 1.0, "temperature": 0.0, "mass_bias": 0.0},
    {"gain": 1.0, "temperature": 0.1, "mass_bias": 1.0},
    {"gain": 1.0, "temperature": math.inf, "mass_bias": 0.0},
)
_SELECTORS: tuple[dict[str, Any], ...] = (
    {"selector": "top_k", "diversity": 0.0},
    {"selector": "greedy", "diversity": 0.5},
    {"selector": "greedy", "diversity": 2.0},
)
_POSITIONS: tuple[dict[str, Any], ...] = ({"position": "keep"}, {"position": "compact"})
_SHARES = (0.5, 0.75, 1.5, 2.0)
_NEW_SCORE = 0.3


def variations(policy: Policy, sites: Sites, visual_tokens: int) -> Iterator[Policy]:
    """Policies that differ from one in a single respect.

    In this order: the treatment of what is dropped, the selector, another score in the mix or one
    less, the share of tokens between two sites, the depth of a site, the rule for positions, one
    site less.

    Args:
        policy: Where to start.
        sites: The model's sites.
        visual_tokens: Visual tokens of one image.

    Yields:
        Policies whose counts may miss the limits.
    """
    reductions = policy.reductions
    for changed in (
        *_changed(reductions, _TREATMENTS + _SELECTORS),
        *_other_scores(reductions, sites),
        *_other_shares(policy, visual_tokens),
        *_other_depths(reductions, sites),
        *_changed(reductions, _POSITIONS),
        *_fewer(reductions),
    ):
        try:
            yield replace(policy, reductions=changed)
        except ValueError:
            # Two reductions at one site, or a grid behind another selector: not a policy.
            continue


_Reductions = tuple[Reduction, ...]


def _changed(reductions: _Reductions, changes: tuple[dict[str, Any], ...]) -> Iterator[_Reductions]:
    for i, reduction in enumerate(reductions):
        for change in changes:
            if any(getattr(reduction, name) != value for name, value in change.items()):
                yield _with(reductions, i, **change)


def _other_scores(reductions: _Reductions, sites: Sites) -> Iterator[_Reductions]:
    for i, reduction in enumerate(reductions):
        if not reduction.uses_scores:
            continue
        searched = (name for name in sites[reduction.site].scores if SCORES[name].searched)
        for name in searched:
            rest = {other: w for other, w in reduction.scores.items() if other != name}
            if name not in reduction.scores:
                mixed = {other: (1 - _NEW_SCORE) * w for other, w in rest.items()}
                yield _with(reductions, i, scores=mixed | {name: _NEW_SCORE})
            elif rest:
                yield _with(reductions, i, scores=rest)


def _other_shares(policy: Policy, visual_tokens: int) -> Iterator[_Reductions]:
    counts = policy.counts(visual_tokens)
    for i in range(len(counts) if len(counts) > 1 else 0):
        for share in _SHARES:
            most = counts[i - 1] if i else visual_tokens
            least = counts[i + 1] if i + 1 < len(counts) else 1
            count = min(most, max(least, round(share * counts[i])))
            if count != counts[i]:
                yield _with(policy.reductions, i, keep=count)


def _other_depths(reductions: _Reductions, sites: Sites) -> Iterator[_Reductions]:
    available = {site.name for site in sites.available()}
    for i, reduction in enumerate(reductions):
        stage, layer = split_site(reduction.site)
        for moved in (layer - 1, layer + 1):
            if f"{stage}.{moved}" in available:
                yield _with(reductions, i, site=f"{stage}.{moved}")


def _fewer(reductions: _Reductions) -> Iterator[_Reductions]:
    for i in range(len(reductions) if len(reductions) > 1 else 0):
        yield reductions[:i] + reductions[i + 1 :]


def _with(reductions: _Reductions, i: int, **change: Any) -> _Reductions:
    return (*reductions[:i], replace(reductions[i], **change), *reductions[i + 1 :])
