"""Sites in the vision tower whose tokens are groups of patches: a search tries settings there.

The code of the tower's blocks runs on the patches that are left, which has no relaxed form: gates
are biases of a mask, and these blocks take none, or windows and tables in place of it. So settings
at these sites are tried in static form alone: each alone, and before the best of all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deos_fx.models.facts import facts_of
from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search.places import spread
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site

__all__ = ["before_others", "in_towers"]

# Sites that are tried, spread over the depth.
_DEPTHS = 4
# What is tried at each: the first of these scores that it has, with and without merging.
_SCORES = ("mutual_attention", "novelty")
_TREATMENTS: tuple[dict[str, Any], ...] = ({}, {"gain": 1.0})
# How many times as many tokens as the next site keeps.
_FACTORS = (1.5, 3.0)


def in_towers(problem: SearchProblem, sites: Sequence[Site]) -> list[tuple[str, Policy]]:
    """Return source and policy of reductions at one of these sites that meet the limits."""
    found = []
    position = facts_of(problem.model).position
    for site, reduction in _settings(sites):
        policy = Policy((replace(reduction, keep=1, position=position),))
        fitted = problem.fit(policy) if problem.runs(policy) else None
        if fitted is not None:
            found.append((f"tried at {site}", fitted))
    return found


def before_others(policy: Policy, sites: Sequence[Site], visual_tokens: int) -> Iterator[Policy]:
    """Yield policies with one reduction more, at one of these sites, before all others.

    Args:
        policy: The policy.
        sites: Sites that are tried.
        visual_tokens: Visual tokens of one image.

    Yields:
        Policies whose counts may miss the limits.
    """
    steps = policy.reductions
    if not steps or split_site(steps[0].site)[0] == "vision":
        return
    first = policy.counts(visual_tokens)[0]
    for _, reduction in _settings(sites):
        for factor in _FACTORS:
            count = round(factor * first)
            if first < count < visual_tokens:
                one_more = replace(reduction, keep=count, position=steps[0].position)
                yield replace(policy, reductions=(one_more, *steps))


def _settings(sites: Sequence[Site]) -> Iterator[tuple[str, Reduction]]:
    for site in spread(sites, _DEPTHS):
        score = next(name for name in _SCORES if name in site.scores)
        for treatment in _TREATMENTS:
            yield site.name, Reduction(site.name, 0.5, scores={score: 1.0}, **treatment)
