"""A share of 1.0 is all tokens and a count of 1 is one: nothing may take one for the other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deos_fx import Budget, Policy, Reduction
from deos_fx.policy.tier import Tier

ALL, ONE = (Policy((Reduction("decoder.0", keep, selector="grid"),)) for keep in (1.0, 1))


def tiered(keep: int | float) -> Reduction:
    return Reduction("projector", 4, tiers=(Tier(keep=keep),))


@pytest.mark.parametrize(
    ("share", "count"),
    [
        (Reduction("decoder.2", 1.0), Reduction("decoder.2", 1)),
        (tiered(1.0), tiered(1)),
        (ALL, ONE),
        (Budget(visual_tokens=1.0), Budget(visual_tokens=1)),
        (Budget(flops=1.0, latency_ms=2), Budget(flops=1, latency_ms=2)),
        (Budget(kv_cache=1.0), Budget(kv_cache=1)),
    ],
)
def test_they_differ_in_every_way(share: Any, count: Any) -> None:
    assert share != count and hash(share) != hash(count) and repr(share) != repr(count)
    assert len({share, count}) == 2


def test_people_see_the_difference() -> None:
    assert "keep 1.0," in str(ALL) and "keep 1," in str(ONE)


def test_equal_ones_have_equal_hashes() -> None:
    again = Policy((Reduction("decoder.0", 1.0, selector="grid"),))
    assert again == ALL and hash(again) == hash(ALL)
    # Only amounts mean two things.
    assert Reduction("projector", 4, gain=1) == Reduction("projector", 4, gain=1.0)
    assert Budget(latency_ms=2) == Budget(latency_ms=2.0)
    assert Reduction("projector", 4) != "projector"


def test_json_names_them_differently_for_readers_without_types() -> None:
    """JavaScript writes 1.0 as 1: the name says what the number is."""
    step = {"site": "decoder.0", "selector": "grid"}
    assert json.loads(ALL.to_json())["reductions"] == [{**step, "share": 1.0}]
    assert json.loads(ONE.to_json())["reductions"] == [{**step, "keep": 1}]
    assert Policy.from_json(ALL.to_json().replace("1.0", "1")) == ALL
    assert Policy.from_json(ONE.to_json()) == ONE
    both = Policy((tiered(0.5),))
    tiers = json.loads(both.to_json())["reductions"][0]["tiers"]
    assert tiers == [{"share": 0.5, "scores": {"cls_attention": 1.0}}]
    assert Policy.from_json(both.to_json()) == both


@pytest.mark.parametrize("keep", [1, 1.0, 0.25, 18])
def test_files_from_before_there_were_shares_are_read(keep: int | float) -> None:
    old = {"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", "keep": keep}]}
    assert Policy.from_json(json.dumps(old)) == Policy((Reduction("projector", keep),))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"share": 0.5, "keep": 3}, "both 'keep' and 'share'"),
        ({"share": "half"}, "share is 'half'; it should be a valid number"),
        ({"share": True}, "share is True; it should be a valid number"),
        ({"share": 2}, "share is 2; it should be less than or equal to 1"),
    ],
)
def test_wrong_shares_are_refused(fields: dict[str, Any], words: str) -> None:
    text = {"deos_fx": "policy", "version": 1, "reductions": [{"site": "projector", **fields}]}
    with pytest.raises(ValueError, match=words):
        Policy.from_json(json.dumps(text))
