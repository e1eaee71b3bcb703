"""Round relaxed reductions to a policy."""

from __future__ import annotations

from collections.abc import Mapping

from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction, site_order

__all__ = ["discretise"]

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
    # Share of the incoming tokens that each site keeps, and fraction of all tokens after it.
    fraction = 1.0
    drops: dict[str, float] = {}
    fractions: dict[str, float] = {}
    for site in sorted(reductions, key=site_order):
        after = reductions[site].keep_fraction(fraction).item()
        drops[site] = after / fraction
        fractions[site] = fraction = after
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
