"""Counts that follow from a policy, and the largest within limits; names of sites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deos_fx.policy.counts import along, as_shares, fit_counts, on_grid, tokens_per_layer, within
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import first_layer, site_order, split_site
from deos_fx.policy.tier import Tier

STEPS = Policy((Reduction("projector", 0.5), Reduction("decoder.2", 0.25)))


def test_sites_have_an_order() -> None:
    sites = ["decoder.10", "projector", "vision.3", "decoder.2", "vision.12"]
    expected = ["vision.3", "vision.12", "projector", "decoder.2", "decoder.10"]
    assert sorted(sites, key=site_order) == expected
    assert split_site("vision.12") == ("vision", 12)
    assert [first_layer(site) for site in expected] == [0, 0, 0, 3, 11]
    with pytest.raises(ValueError, match="no site 'decoder'; a site is"):
        split_site("decoder")


def test_tokens_at_every_layer() -> None:
    assert along(9, [(0, 5), (3, 2)], 5) == [5, 5, 5, 2, 2]
    assert along(9, [(7, 1)], 3) == [9, 9, 9]
    # Two images of other sizes: each keeps its share.
    assert tokens_per_layer(STEPS, (64, 16), 5) == [40, 40, 40, 20, 20]
    assert tokens_per_layer(Policy(), (64, 16), 2) == [80, 80]


@given(st.integers(4, 40), st.integers(1, 60))
def test_the_largest_counts_within_a_limit(tokens: int, limit: int) -> None:
    def amounts(policy: Policy) -> dict[str, float]:
        first, second = policy.counts(tokens)
        return {"flops": first + 3 * second}

    fitted = fit_counts(STEPS, tokens, amounts, {"flops": limit})
    if fitted is None:
        assert limit < 4
        return
    first, second = fitted.counts(tokens)
    assert first + 3 * second <= limit
    # Not one token more, at the deepest site first.
    assert second == first or first + 3 * second + 3 > limit
    assert first == tokens or first + 3 * second + 1 > limit


def test_costs_without_a_limit_are_free() -> None:
    assert within({"flops": 9.0, "kv_cache": 1.0}, {"kv_cache": 1.0})
    assert not within({"flops": 9.0}, {"flops": 8.9})


def test_shares_give_the_same_counts() -> None:
    policy = Policy((Reduction("projector", 7), Reduction("decoder.2", 3)))
    assert as_shares(policy, 64).counts(64) == policy.counts(64)
    assert as_shares(policy, 64).counts(128) == [14, 6]


def test_counts_of_tiers_are_shares_of_what_their_reduction_keeps() -> None:
    tiers = (Tier(keep=3, selector="strided"), Tier(keep=0.5, scores={"novelty": 1.0}))
    policy = Policy((Reduction("projector", 12, scores={"feature_norm": 1.0}, tiers=tiers),))
    (step,) = as_shares(policy, 48).reductions
    assert [step.tier_counts(step.count(size)) for size in (48, 16, 96)] == [
        [3, 3, 6],
        [1, 1, 2],
        [6, 6, 12],
    ]


def test_anchors_have_a_layout_and_later_reductions_follow() -> None:
    grid = Reduction("projector", 35, selector="grid")
    policy = on_grid(Policy((grid, Reduction("decoder.2", 34))), 6, 6)
    first, second = policy.counts(36)
    # 5 * 6 windows over 6 * 6 tokens; 31 to 35 are no such product.
    assert (first, second) == (30, 30)
