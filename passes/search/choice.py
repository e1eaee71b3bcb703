"""Choose among the places where steps were tried."""

from __future__ import annotations

from collections.abc import Sequence

from deos_fx.passes.search.descent import Descent

__all__ = ["charged", "descended", "finalists"]

# What a site has to earn: the loss of a place counts so much more for each site after the first.
_CHARGE = 0.05


def charged(loss: float, sites: int) -> float:
    """Return a loss with a charge for every site but the first."""
    return loss * (1 + _CHARGE * (sites - 1))


def finalists(tried: Sequence[Descent], moved: Sequence[Descent], pairs: int) -> list[Descent]:
    """Return the best places after the trials: a single site, and pairs.

    Args:
        tried: The places that were tried first, spread over the depth.
        moved: Those near the best of them. Only the best of these can be among the pairs, so that
            places elsewhere go on as well: after few steps, which is better is hardly known.
        pairs: Largest number of pairs.
    """
    best = min([*tried, *moved], key=descended)
    ranked = [best, *(each for each in sorted(tried, key=descended) if each is not best)]
    # A pair learns faster than a single site, but costs more. So no comparison between them yet.
    single = [each for each in ranked if len(each.reductions) == 1][:1]
    return single + [each for each in ranked if len(each.reductions) > 1][:pairs]


def descended(descent: Descent) -> float:
    """Return the loss that a descent has ended at, with the charge for its sites.

    The lowest loss on its way may be that of a start from which steps lead nowhere.
    """
    measured = [entry["static"] for entry in descent.state.history if "static" in entry]
    # Case: no step was finite until the first loss was due.
    last = measured[-1] if measured else descent.state.best_loss
    return charged(last, len(descent.reductions))
