"""The policies that a search tries: rounded steps, presets, and variations of the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from deos_fx import presets
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.operator import SCORES
from deos_fx.passes.analyse.sites import Sites
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.regimes import PRUNE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import RANGES, Reduction
from deos_fx.policy.site import site_order, split_site

__all__ = [
    "PRESETS",
    "adapted",
    "discretise",
    "fitted_preset",
    "fitted_to",
    "from_presets",
    "preset_tokens",
    "variations",
]

# *** rounded steps ***

# A site that keeps more than this share of the tokens that reach it is left out of the policy.
_NEARLY_ALL = 0.97


def discretise(
    reductions: Mapping[str, RelaxedReduction], visual_tokens: int, most_sites: int | None = None
) -> Policy:
    """Round relaxed reductions to a policy, which may still miss its limits.

    Args:
        reductions: Site -> relaxed reduction.
        visual_tokens: Visual tokens of one image.
        most_sites: Largest number of sites; those that drop the largest shares are kept. None for
            all sites.

    Returns:
        The policy; sites that keep nearly everything are left out.
    """
    # Of each site, the share of the incoming tokens that it keeps, and the fraction of all tokens
    # that is left after it.
    fraction = 1.0
    drops: dict[str, float] = {}
    fractions: dict[str, float] = {}
    for site in sorted(reductions, key=site_order):
        after = reductions[site].keep_fraction(fraction).item()
        drops[site] = after / fraction
        fractions[site] = fraction = after
    # The smallest shares first: these sites drop most.
    wanted = sorted(drops, key=drops.__getitem__)[:most_sites]
    chosen: list[Reduction] = []
    present = 1.0
    for site in sorted(wanted, key=site_order):
        if fractions[site] < _NEARLY_ALL * present:
            # Fractions are of all visual tokens, so a site that is left out changes no other count.
            present = fractions[site]
            count = max(1, round(present * visual_tokens))
            chosen.append(reductions[site].to_reduction(site, count))
    return Policy(tuple(chosen))


# *** presets ***

PRESETS = ("fastv", "pyramid_drop", "merge", "avg_pool", "redistribute")
"""The presets that a search tries: of every regime one, and the stages of the decoder."""


def from_presets(problem: SearchProblem) -> list[tuple[str, Policy]]:
    """Fit the presets to the same limits, so that the search returns nothing worse than them.

    Returns:
        Source and policy of each proposal.
    """
    fitted = ((name, fitted_preset(problem, name)) for name in PRESETS)
    return [(f"preset {name}", policy) for name, policy in fitted if policy is not None]


def fitted_preset(problem: SearchProblem, name: str) -> Policy | None:
    """Fit a preset in its published setting to the limits; None if that is not possible."""
    try:
        policy = presets.fit(name, preset_tokens(problem), **fitted_to(problem))
    except ValueError:
        # Case: the preset cannot meet the budget, or does not fit this number of tokens.
        return None
    return adapted(problem, policy)


def fitted_to(problem: SearchProblem) -> dict[str, Any]:
    """Return the model, and what its images are like, as arguments of `presets.fit` and `tune`."""
    return {
        "model": problem.model,
        "visual_tokens": problem.layout.grid,
        "example_inputs": problem.training[0].call.inputs,
    }


def preset_tokens(problem: SearchProblem) -> float:
    """Return the number of tokens of an image that presets are fitted to.

    If there is no such limit, it is all of them.
    """
    share = problem.limits.get("visual_tokens", math.inf) / problem.layout.images
    return min(share, problem.visual_tokens)


def adapted(problem: SearchProblem, policy: Policy) -> Policy | None:
    """Return a preset's policy such that it runs and meets the limits; None if it cannot."""
    policy = problem.cost.for_any_size(_with_own_scores(problem.sites, policy))
    if not problem.runs(policy):
        return None
    if problem.meets(policy):
        # Case: the counts of the preset stay as they are.
        return policy
    fitted = problem.fit(policy)
    # With fewer tokens, its tiers may no longer share them.
    return fitted if fitted is not None and problem.runs(fitted) else None


def _with_own_scores(sites: Sites, policy: Policy) -> Policy:
    """Let reductions rank by novelty where their site lacks one of their scores."""
    steps = [
        replace(step, scores={"novelty": 1.0})
        if not set(step.scores) <= set(sites[step.site].scores)
        else step
        for step in policy.reductions
    ]
    return replace(policy, reductions=tuple(steps))


# *** variations ***

# Treatments of dropped tokens: pruning, merging with and without a mass bias, soft merging, and
# uniform redistribution. A variation makes one of these changes.
_TREATMENTS: tuple[dict[str, Any], ...] = (
    PRUNE,
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
# Factors of a number, and of the weight of one of several scores.
_FACTORS = {"diversity": (0.7, 1.4), "sharpness": (0.7, 1.4), "temperature": (0.5, 2.0)}
_SUMMANDS = {"gain": (-0.1, 0.1), "mass_bias": (-0.25, 0.25)}
_WEIGHTS = (0.5, 2.0)
# Factors by which the count of one site changes.
_SHARES = (0.5, 0.75, 1.5, 2.0)
# Weight of a score that is added to the mix; the others share the rest.
_NEW_SCORE = 0.3


def variations(policy: Policy, sites: Sites, visual_tokens: int) -> Iterator[Policy]:
    """Yield policies that differ from a given one in a single respect.

    In this order: a number, the treatment of dropped tokens, the selector, another score in the mix
    or one less, the share of tokens between two sites, the depth of a site, the rule for positions,
    one site less.

    Args:
        policy: The policy to vary.
        sites: The model's sites.
        visual_tokens: Visual tokens of one image.

    Yields:
        Policies whose counts may miss the limits.
    """
    reductions = policy.reductions
    for changed in (
        *_nudged(reductions),
        *_changed(reductions, _TREATMENTS + _SELECTORS),
        *_other_scores(reductions, sites),
        *_other_shares(policy, visual_tokens),
        *_other_depths(reductions, sites),
        *_changed(reductions, _POSITIONS),
        *_fewer(reductions),
    ):
        if changed == reductions:
            # Case: a number is at the end of its range already.
            continue
        try:
            yield replace(policy, reductions=changed)
        except ValueError:
            # Case: not a valid policy (two reductions at one site, or a grid after another
            # selector).
            continue


_Reductions = tuple[Reduction, ...]


def _changed(reductions: _Reductions, changes: tuple[dict[str, Any], ...]) -> Iterator[_Reductions]:
    """Apply each change to each reduction that it does not leave the same."""
    for i, reduction in enumerate(reductions):
        for change in changes:
            if any(getattr(reduction, name) != value for name, value in change.items()):
                yield _with(reductions, i, **change)


def _nudged(reductions: _Reductions) -> Iterator[_Reductions]:
    """Change one number of one reduction a little: those that have an effect in it."""
    for i, reduction in enumerate(reductions):
        for name, factors in _FACTORS.items():
            value = getattr(reduction, name)
            if value == math.inf or name == "sharpness" and reduction.weighting != "score":
                continue
            for factor in factors:
                yield _with(reductions, i, **{name: _in_range(name, factor * value)})
        for name, summands in _SUMMANDS.items() if reduction.gain else ():
            for summand in summands:
                # Rounded, so that 0.3 - 0.1 - 0.1 - 0.1 is 0: no merging.
                value = _in_range(name, round(getattr(reduction, name) + summand, 9))
                yield _with(reductions, i, **{name: value})
        if len(reduction.scores) > 1:
            for score, weight in reduction.scores.items():
                for factor in _WEIGHTS:
                    yield _with(reductions, i, scores={**reduction.scores, score: factor * weight})


def _in_range(name: str, value: float) -> float:
    """Return the number nearest to a value that a policy may hold."""
    least, most = RANGES.get(name, (0.0, math.inf))
    return min(most, max(least, value))


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
    # A single site is fitted to the limits anyway.
    for i in range(len(counts) if len(counts) > 1 else 0):
        for share in _SHARES:
            # Counts never grow with depth.
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
