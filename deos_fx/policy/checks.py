"""Refuse settings of a reduction that contradict each other, or have no effect together."""

from __future__ import annotations

from typing import Any

from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.site import split_site
from deos_fx.policy.tier import MOST_TOKENS

_Reduction = Any
"""A `Reduction`, whose file imports this one."""

__all__ = ["check_halves", "check_together"]


def check_halves(reduction: _Reduction, before: int, after: int) -> None:
    """Check that halves of an image's tokens can be merged into as few as stay.

    Args:
        reduction: The reduction; only the selector 'bipartite' makes halves.
        before: Tokens that come in.
        after: Tokens that stay.

    Raises:
        ValueError: If more have to leave than one half has.
    """
    if reduction.selector != "bipartite":
        return
    other = before - len(range(reduction.selection[0].options["first"], before, 2))
    if after < other:
        raise ValueError(
            f"{reduction.site}: the selector 'bipartite' keeps {after} of {before} tokens, but at "
            f"most one half can be merged into the other: keep at least {other}, and reduce at "
            "several sites"
        )


def check_together(reduction: _Reduction) -> None:
    """Refuse combinations of settings that contradict each other."""
    site, stage = reduction.site, split_site(reduction.site)[0]
    # Where the output goes.
    if reduction.order != "position" and (stage == "decoder" or reduction.position != "compact"):
        raise ValueError(
            f"{site}: order {reduction.order!r} needs a site before the decoder and the position "
            f"'compact', because tokens out of the image's order have no positions to keep"
        )
    if reduction.keep_class and (stage != "vision" or reduction.order == "position"):
        raise ValueError(
            f"{site}: keep_class works in the vision tower with the order 'tier' or 'selection'"
        )
    # What takes in what.
    neighbours, by_nearest = reduction.neighbours, reduction.assignment == "k_nearest"
    if by_nearest != (neighbours > 0) or not 0 <= neighbours <= MOST_TOKENS:
        raise ValueError(
            f"{site}: assignment {reduction.assignment!r} with {neighbours} neighbours; give "
            f"'k_nearest' and a number of neighbours together, at most {MOST_TOKENS}"
        )
    if reduction.assignment == "window" and reduction.selector != "grid":
        raise ValueError(f"{site}: the assignment 'window' needs the selector 'grid'")
    # A raw score is used as it is; a mix is always of standardized ones.
    if reduction.weighting == "raw" and len(reduction.scores) != 1:
        raise ValueError(f"{site}: weighting 'raw' needs exactly one score, not {reduction.scores}")
    # The weights of a mean have a positive sum.
    signed = [name for name in reduction.scores if SCORES[name].signed]
    if reduction.weighting == "raw" and signed and (reduction.exponent or reduction.average):
        raise ValueError(
            f"{site}: weighting 'raw' with the score {signed[0]!r}, which may be negative, makes "
            "only sums and no means; choose exponent=0 without average, or the weighting 'score'"
        )
    # What is chosen.
    if reduction.selector == "bipartite" and reduction.order == "tier":
        raise ValueError(
            f"{site}: the halves of 'bipartite' are one tier, and the order 'tier' would mix "
            f"them; choose 'selection' or 'position'"
        )
    # The residual token is the best one that is not chosen: that takes a ranking.
    first = SELECTORS[reduction.selector]
    if reduction.residual and (not first.ranks or first.flags):
        raise ValueError(
            f"{site}: residual needs a selector that ranks, not {reduction.selector!r}"
        )
    if reduction.residual and reduction.average:
        raise ValueError(f"{site}: average and residual exclude each other; choose one")
    if reduction.sharpness != 1 and reduction.weighting != "score":
        raise ValueError(
            f"{site}: sharpness {reduction.sharpness} has no effect with the weighting "
            f"{reduction.weighting!r}; choose 'score' or leave it at 1"
        )
    _check_learned(reduction)
    _check_tiers(reduction)


def _check_learned(reduction: _Reduction) -> None:
    """Check that every learned part has an effect, and that none is missing."""
    names = reduction.learned.keys()
    if ("metric" in names) != ("learned" in reduction.similarity):
        raise ValueError(
            f"{reduction.site}: the similarity 'learned' and the learned part 'metric' need each "
            f"other; give both or none"
        )
    scores = reduction.learned.scores
    if scores and not reduction.uses_scores:
        raise ValueError(
            f"{reduction.site}: the learned {', '.join(scores)} has no effect, because nothing is "
            f"ranked or weighted by score; leave it out"
        )
    if scores and reduction.weighting == "raw":
        raise ValueError(f"{reduction.site}: a learned score has no raw values; choose 'score'")


def _check_tiers(reduction: _Reduction) -> None:
    """Check what each tier chooses, and from which tokens."""
    # A selector that flags picks nothing itself: it says which tokens the next tier prefers.
    last = reduction.selection[-1].selector
    if SELECTORS[last].flags:
        raise ValueError(
            f"{reduction.site}: {last!r} only says what a later tier prefers; add Tier(keep=1.0)"
        )
    for tier in reduction.tiers:
        # A further tier leaves out what earlier ones took, so its selector must ask for that.
        selector = SELECTORS[tier.selector]
        if not selector.flags and "taken" not in selector.needs:
            raise ValueError(
                f"{reduction.site}: {tier.selector!r} chooses among all tokens of a site, so it "
                f"works in the first tier only"
            )
        if (tier.keep == 0) != selector.flags:
            raise ValueError(
                f"{reduction.site}: a tier of {tier.selector!r} keeps {tier.keep!r}; give "
                + ("0, it chooses none itself" if selector.flags else "it some tokens")
            )
