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
        tried: The places that were tried.
        moved: Those near the best of them, which takes part as the best of its neighbourhood.
        pairs: Largest number of pairs.
    """
    best = min(tried, key=descended)
    near = min([best, *moved], key=descended)
    ranked = sorted([near if each is best else each for each in tried], key=descended)
    # A pair learns faster than a single site, but costs more. So no comparison between them yet.
    single = [each for each in ranked if len(each.reductions) == 1][:1]
    return single + [each for each in ranked if len(each.reductions) > 1][:pairs]


def descended(descent: Descent) -> float:
    """Return the loss that a descent has reached, with the charge for its sites."""
    return charged(descent.state.best_loss, len(descent.reductions))
