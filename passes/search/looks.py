"""Say what the learned scores of a policy look at, in terms of scores that have names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.operator.scores import SCORES, standardize
from deos_fx.passes.pipeline import run_graph
from deos_fx.passes.search.descent import relaxed_graph
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_result import Look

__all__ = ["looks_of"]

# Names beside which a learned score is shown, at most.
_NAMED = 3
# What is no spread of a score, beside the 1 of standardized ones.
_ROUNDING = 1e-3


@torch.no_grad()
def looks_of(problem: SearchProblem, policy: Policy) -> list[Look]:
    """Measure every learned score of a policy on the first held-back batch.

    Args:
        problem: The problem.
        policy: The policy.

    Returns:
        One entry for each learned score: its share of the spread of all scores of its site, and its
        correlations with the scores by name that the site has, the strongest first. Both are means
        over images, of all tokens that would reach the site without another reduction; images whose
        tokens are all alike have no share.
    """
    batch = problem.scoring[0]
    watched = {}
    for reduction in policy.reductions:
        if reduction.learned.scores:
            site = problem.sites[reduction.site]
            named = [n for n in site.scores if SCORES[n].searched and _has(problem, reduction, n)]
            # A site that is not active, but observes everything that has a name.
            every = {**dict.fromkeys(named, 1.0), **reduction.scores}
            start = replace(reduction, scores=every, keep=1.0)
            watched[reduction.site] = RelaxedReduction(start, activation=0.0, retention=0.5)
    if not watched:
        return []
    seen: dict[str, tuple[Any, ...]] = {}

    def remember(site: str, given: tuple[Any, ...]) -> None:
        seen[site] = given

    handles = [
        each.register_forward_pre_hook(lambda _, given, site=site: remember(site, given))
        for site, each in watched.items()
    ]
    try:
        run_graph(relaxed_graph(watched, batch), batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    looks = []
    for reduction in policy.reductions:
        if reduction.site in watched:
            tokens, alive, _, features = seen[reduction.site][:4]
            given = {**features, "tokens": tokens}
            parts, others = _scores(watched[reduction.site], given, alive, reduction.scores)
            looks += _looks(reduction.site, parts, others, reduction.learned)
    return looks


def _has(problem: SearchProblem, reduction: Reduction, score: str) -> bool:
    """Return whether a score can take the place of a reduction's; some need a grid of tokens."""
    return problem.runs(Policy((replace(reduction, scores={score: 1.0}),)))


def _scores(
    watched: RelaxedReduction,
    features: Mapping[str, Tensor],
    alive: Tensor,
    weights: Mapping[str, float],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what is added up to the score of a site, and all scores that have names, by name."""
    named = {
        name: standardize(value.expand_as(alive)) for name, value in watched.named_scores(features)
    }
    parts = {name: weight * named[name] for name, weight in weights.items()}
    return parts | dict(watched.learned_scores(features)), named


def _looks(
    site: str, parts: Mapping[str, Tensor], named: Mapping[str, Tensor], learned: Learned
) -> list[Look]:
    """Compare the learned scores of a site with the named ones."""
    total: Any = sum(part.var(dim=-1) for part in parts.values())
    # Plain images, such as empty tiles, have no spread to share.
    spread = total > _ROUNDING
    looks = []
    for name in learned.scores:
        part = parts[name].expand_as(next(iter(named.values())))
        shares = (part.var(dim=-1) / total)[spread]
        share = shares.mean().item() if len(shares) else 0.0
        like = {other: (standardize(part) * value).mean().item() for other, value in named.items()}
        strongest = sorted(like, key=lambda other: -abs(like[other]))[:_NAMED]
        looks.append(Look(site, name, share, {other: like[other] for other in strongest}))
    return looks
