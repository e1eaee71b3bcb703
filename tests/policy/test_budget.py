"""Budgets: kinds of limits, their conversion, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deos_fx.policy.budget import Budget


@dataclass(frozen=True)
class FakeCost:
    visual_tokens: float = 144.0
    flops: int = 10**9
    kv_bytes: int = 1 << 20


NAMES = ["visual_tokens", "flops", "kv_cache", "latency_ms"]


def test_floats_are_fractions_and_ints_are_absolute() -> None:
    budget = Budget(visual_tokens=0.125, flops=5, kv_cache=1.0, latency_ms=12.5)
    assert budget.limits(FakeCost()) == {
        "visual_tokens": 18.0,
        "flops": 5.0,
        "kv_cache": float(1 << 20),
        "latency_ms": 12.5,
    }


def test_only_the_limits_given_are_returned() -> None:
    assert Budget(visual_tokens=1).limits(FakeCost()) == {"visual_tokens": 1.0}
    assert Budget(visual_tokens=1.0).limits(FakeCost()) == {"visual_tokens": 144.0}


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10**6))
def test_a_fraction_never_exceeds_the_model(fraction: float, tokens: int) -> None:
    limit = Budget(visual_tokens=fraction).limits(FakeCost(visual_tokens=tokens))["visual_tokens"]
    assert limit <= tokens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, math.nan, math.inf, True, "half"])
def test_what_is_not_a_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"budget {name}=.*positive number"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", NAMES[:3])
def test_floats_above_one_are_refused_with_the_fix(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=18.5.* give the int 18"):
        Budget(**{name: 18.5})


def test_milliseconds_may_be_any_positive_number() -> None:
    assert Budget(latency_ms=250.5).limits(FakeCost()) == {"latency_ms": 250.5}


def test_more_visual_tokens_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match="visual_tokens=200, but the model has only 144"):
        Budget(visual_tokens=200).limits(FakeCost())


def test_other_absolute_limits_may_be_generous() -> None:
    assert Budget(flops=10**12).limits(FakeCost()) == {"flops": 1e12}


def test_a_required_budget_needs_a_limit() -> None:
    assert Budget().is_empty
    with pytest.raises(ValueError, match="no limit; give at least one of visual_tokens"):
        Budget().require()
    budget = Budget(flops=0.5)
    assert budget.require() is budget


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, float("nan")])
def test_budget_out_of_range(limit):
    with pytest.raises(ValueError, match="budget visual_tokens="):
        Budget(visual_tokens=limit)
