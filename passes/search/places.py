"""The places at which a search tries to reduce: one site, or a pair of sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import site_order

__all__ = ["factors", "nearby", "placed", "placements", "spread", "widened"]

_T = TypeVar("_T")

# Sites that are tried alone, and in pairs with the first of them.
_DEPTHS, _PAIRS = 4, 3
# How many times as many tokens as the limits allow steps may begin with.
_WIDEST = 8


def placements(
    problem: SearchProblem,
    sites: Sequence[Site],
    starts: Callable[[Sequence[Site]], Mapping[str, Reduction]],
) -> list[Policy]:
    """Return the places to try, as policies that meet the limits.

    Every site that can meet the limits alone is tried, of many at most `_DEPTHS` spread over the
    depth, and pairs of the first of them with a later site.

    Args:
        problem: The problem.
        sites: The sites, in order of depth.
        starts: Makes what the steps start from at some sites, by name.
    """
    # Whether a site can meet the limits does not depend on how it chooses.
    plain = {site.name: Reduction(site.name, 1, scores={"feature_norm": 1.0}) for site in sites}
    feasible = [site for site in sites if problem.fit(Policy((plain[site.name],))) is not None]
    alone = spread(feasible, _DEPTHS)
    if not alone:
        return []
    after = site_order(alone[0].name)
    later = spread([site for site in sites if site_order(site.name) > after], _PAIRS)
    start = starts(list({site.name: site for site in (*alone, *later)}.values()))
    places = [[start[site.name]] for site in alone]
    places += [[start[alone[0].name], start[site.name]] for site in later]
    return [policy for place in places if (policy := placed(problem, place)) is not None]


def placed(problem: SearchProblem, place: Sequence[Reduction]) -> Policy | None:
    """Return a policy that starts at one or two sites and meets the limits; None if none does.

    Args:
        problem: The problem.
        place: What the steps start from at each site.
    """
    whole = problem.visual_tokens
    found = problem.fit(Policy(tuple(replace(each, keep=1) for each in place[:1])))
    if len(place) > 1 and found is not None:
        (first,) = found.reductions
        # The first site keeps twice as many, so that something is left for the second.
        twice = min(whole, 2 * first.count(whole))
        second = replace(place[1], keep=math.ceil(twice / 4))
        found = problem.fit(Policy((replace(first, keep=twice), second)))
    if found is None:
        return None
    # A site that drops nothing is no place to start from.
    counts = [whole, *found.counts(whole)]
    return found if all(x > y for x, y in zip(counts, counts[1:], strict=False)) else None


def widened(problem: SearchProblem, policy: Policy, factor: int) -> tuple[SearchProblem, Policy]:
    """Multiply the counts of a policy, and raise the limits to what it costs then.

    Args:
        problem: The problem.
        policy: A policy that meets its limits.
        factor: A factor; with 1, nothing changes.

    Returns:
        The problem with other limits, and the policy.
    """
    if factor == 1:
        return problem, policy
    whole = problem.visual_tokens
    counts = [min(whole, factor * count) for count in policy.counts(whole)]
    wide = Policy(
        tuple(
            replace(reduction, keep=count)
            for reduction, count in zip(policy.reductions, counts, strict=True)
        )
    )
    wide = problem.cost.for_any_size(wide)
    others = [(cost, dict(cost.amounts(wide, own))) for cost, own in problem.others]
    return replace(problem, limits=problem.amounts(wide), others=others), wide


def factors(problem: SearchProblem, start: Policy, steps: int) -> list[int]:
    """Return by how much counts are larger than the limits allow, in turn; the last is 1.

    With too few tokens, every choice of them answers equally badly, and no gradient says which
    would be better. So steps begin with so many tokens that a policy loses at most half of what
    there is to lose, with a single token. Two sites share their tokens from the first step on.

    Args:
        problem: The problem.
        start: What the steps start from, at one or two sites.
        steps: Number of steps, of which each factor needs one.
    """
    if len(start.reductions) > 1:
        return [1]
    loss = problem.static_loss
    single = Policy((replace(start.reductions[0], keep=1),))
    half = (loss(Policy()) + loss(single)) / 2
    found = [1]
    most = problem.visual_tokens / start.counts(problem.visual_tokens)[-1]
    # With twice the tokens, something must still be dropped.
    while (
        2 * found[0] < min(most, 2 * _WIDEST) and loss(widened(problem, start, found[0])[1]) > half
    ):
        found.insert(0, 2 * found[0])
    # There must be steps for each.
    return found[-max(1, min(len(found), steps)) :]


def spread(items: Sequence[_T], most: int) -> list[_T]:
    """Return at most so many items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / max(most - 1, 1)
    return [items[round(i * step)] for i in range(most)]


def nearby(place: Sequence[str], sites: Sequence[Site], distance: int) -> list[list[str]]:
    """Return the places whose last site is so many sites before or after that of a place.

    Args:
        place: Names of one or two sites.
        sites: All sites, in order of depth.
        distance: How far away.
    """
    order = [site.name for site in sites]
    *before, last = place
    first = order.index(before[-1]) + 1 if before else 0
    depths = (order.index(last) + shift for shift in (-distance, distance))
    return [[*before, order[i]] for i in depths if first <= i < len(order)]
