"""DOP's search (Liu et al., arXiv 2507.02909), as far as a policy can express what it finds.

DOP splits visual tokens by rank into groups and drops each group from some depth on. It measures
what every group costs at every depth by itself, adds these divergences up as if they were
independent, and takes the depths with the smallest sum that meets the budget. Differences:

1. DOP also lets attention and feed-forward of a layer skip different groups. A policy removes a
   token from the sequence, so here a group has one depth.
2. DOP measures the divergence from the unreduced model; here it is the loss that all searches of
   the comparison measure, on the same batches.
3. Groups are nested: what the group of rank i costs at a depth is the loss with i groups, minus
   that with i + 1. A policy cannot drop the best tokens and keep worse ones.
4. DOP ranks by attention and prunes. Here, ranking and treatment are the best of a few tried at
   the first site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import first_layer

__all__ = ["depthwise"]

_Table = dict[tuple[int, int], tuple[float, list[str | None]]]
"""Place of the last site used and tokens so far -> the smallest sum, and the sites."""

_RANKINGS = (
    {"cls_attention": 1.0},
    {"text_relevance": 1.0},
    {"cls_attention": 0.67, "text_relevance": 0.33},
    {"novelty": 1.0},
)
_TREATMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"gain": 1.0, "mass_bias": 1.0},
)


def depthwise(
    problem: SearchProblem, sites: Sequence[Site], evaluations: int
) -> Iterator[tuple[Policy, float]]:
    """Search as DOP does.

    Args:
        problem: The problem.
        sites: The sites, in order of depth; groups are dropped at these.
        evaluations: The most forward passes of a batch.

    Yields:
        Policies that meet the limits, with their losses; the last is that of the search.
    """
    until = problem.effort.evaluations + evaluations
    # 1. The ranking and the treatment, with everything dropped at the first site.
    best: tuple[float, Reduction] | None = None
    for chosen in _starts(sites[0]):
        policy = problem.fit(Policy((chosen,)))
        if policy is None:
            break
        loss = problem.static_loss(policy)
        yield policy, loss
        if best is None or loss < best[0]:
            best = loss, chosen
    reduction = best[1] if best else Reduction(sites[0].name, 1, scores={"novelty": 1.0})
    # 2. What every group costs at every depth, on as many batches as there are evaluations for.
    counts = _group_sizes(problem.visual_tokens)
    left = until - problem.effort.evaluations - len(problem.scoring)
    batches = left // (len(sites) * (len(counts) - 1) + 1)
    if batches < 1:
        return
    small = replace(problem, scoring=problem.scoring[: min(batches, len(problem.scoring))])
    losses = {
        (count, site.name): small.static_loss(Policy((_at(site, count, reduction),)))
        for count in counts[1:]
        for site in sites
    }
    unreduced = small.static_loss(Policy())
    losses |= {(counts[0], site.name): unreduced for site in sites}
    # 3. The depths with the smallest sum.
    layers = problem.cost.signature.decoder_layers
    limit = math.floor(problem.limits["visual_tokens"] / problem.layout.images * layers)
    chosen_sites = _cheapest(counts, [site.name for site in sites], losses, layers, limit)
    steps: dict[str, int] = {}
    for count, site in zip(counts[1:], chosen_sites, strict=True):
        if site is not None:
            # Of groups dropped at one site, the last one decides how many stay.
            steps[site] = count
    by_name = {site.name: site for site in sites}
    found = problem.fit(
        Policy(tuple(_at(by_name[site], count, reduction) for site, count in steps.items()))
    )
    if found is not None:
        yield found, problem.static_loss(found)


def _starts(site: Site) -> Iterator[Reduction]:
    """Yield the rankings and treatments that are tried."""
    for scores in _RANKINGS:
        if set(scores) <= set(site.scores):
            for treatment in _TREATMENTS:
                yield Reduction(site.name, 1, scores=scores, **treatment)


def _at(site: Site, count: int, reduction: Reduction) -> Reduction:
    """Return the reduction at another site, by the attention of the last token if it has to be."""
    kept = {name: w for name, w in reduction.scores.items() if name in site.scores}
    scores = kept if len(kept) == len(reduction.scores) else {"last_text_attention": 1.0}
    return replace(reduction, site=site.name, keep=count, scores=scores)


def _group_sizes(visual_tokens: int) -> list[int]:
    """Return how many tokens are left after each group: half of those before, down to one."""
    counts = [visual_tokens]
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] / 2))
    return counts


def _cheapest(
    counts: Sequence[int],
    sites: Sequence[str],
    losses: dict[tuple[int, str], float],
    layers: int,
    limit: int,
) -> list[str | None]:
    """Return where each group is dropped: the smallest sum of losses within the limit.

    Args:
        counts: Tokens before the first group and after each.
        sites: In order of depth.
        losses: Loss by tokens left and site.
        layers: Decoder layers.
        limit: Tokens of all layers together.

    Returns:
        A site for each group, in order of depth; None where it stays to the end.
    """
    depths: list[str | None] = [*sites, None]
    table: _Table = {(0, counts[-1] * layers): (0.0, [])}
    for before, after in zip(counts, counts[1:], strict=False):
        following: _Table = {}
        for (last, used), (total, chosen) in table.items():
            for place in range(last, len(depths)):
                site = depths[place]
                through = layers if site is None else first_layer(site)
                spent = used + (before - after) * through
                cost = 0.0 if site is None else losses[after, site] - losses[before, site]
                key, value = (place, spent), (total + cost, [*chosen, site])
                if spent <= limit and (key not in following or value[0] < following[key][0]):
                    following[key] = value
        table = following
    return min(table.values(), key=lambda value: value[0])[1]
