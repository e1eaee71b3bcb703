"""Small variations of a policy, used to polish the best candidates in their static form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deos_fx.operator import SCORES
from deos_fx.passes.analyse.sites import Sites
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction, split_site

__all__ = ["variations"]

# Treatments of dropped tokens. A variation makes one change; counts are then fitted to the limits
# again.
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
# Factors on the count of one site.
_SHARES = (0.5, 0.75, 1.5, 2.0)
# Weight of a score that is added to the mix; the others share the rest.
_NEW_SCORE = 0.3


def variations(policy: Policy, sites: Sites, visual_tokens: int) -> Iterator[Policy]:
    """Yield policies that differ from a given one in a single respect.

    In this order: the treatment of dropped tokens, the selector, another score in the mix or one
    less, the share of tokens between two sites, the depth of a site, the rule for positions, one
    site less.

    Args:
        policy: The policy to vary.
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
            # Not a policy: two reductions at one site, or a grid after another selector.
            continue


_Reductions = tuple[Reduction, ...]


def _changed(reductions: _Reductions, changes: tuple[dict[str, Any], ...]) -> Iterator[_Reductions]:
    """Apply each change to each reduction that it does not leave the same."""
    for i, reduction in enumerate(reductions):
        for change in changes:
            if any(getattr(reduction, name) != value for name, value in change.items()):
                yield _with(reductions, i, **change)


def _other_scores(reductions: _Reductions, sites: Sites) -> Iterator[_Reductions]:
    """Add a score that the site has to the mix, or remove one of several."""
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
    """Change the count of one of several sites, within those of its neighbours."""
    counts = policy.counts(visual_tokens)
    for i in range(len(counts) if len(counts) > 1 else 0):
        for share in _SHARES:
            most = counts[i - 1] if i else visual_tokens
            least = counts[i + 1] if i + 1 < len(counts) else 1
            count = min(most, max(least, round(share * counts[i])))
            if count != counts[i]:
                yield _with(policy.reductions, i, keep=count)


def _other_depths(reductions: _Reductions, sites: Sites) -> Iterator[_Reductions]:
    """Move a reduction by one block or layer."""
    available = {site.name for site in sites.available()}
    for i, reduction in enumerate(reductions):
        stage, layer = split_site(reduction.site)
        for moved in (layer - 1, layer + 1):
            if f"{stage}.{moved}" in available:
                yield _with(reductions, i, site=f"{stage}.{moved}")


def _fewer(reductions: _Reductions) -> Iterator[_Reductions]:
    """Leave out one of several reductions."""
    for i in range(len(reductions) if len(reductions) > 1 else 0):
        yield reductions[:i] + reductions[i + 1 :]


def _with(reductions: _Reductions, i: int, **change: Any) -> _Reductions:
    """Change fields of one reduction."""
    return (*reductions[:i], replace(reductions[i], **change), *reductions[i + 1 :])
