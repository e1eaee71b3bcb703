"""The rule of how close results must be allows no more than the oracle's own rounding does."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close, roundings_of, tolerance
from rounding import measure


@pytest.mark.parametrize(
    ("name", "policy"),
    [("glm4v", "decoder"), ("gemma4", "decoder"), ("granite4_vision", "both")],
)
def test_the_oracle_justifies_the_rule(name: str, policy: str) -> None:
    oracle, ours = measure(name, policy)
    # Two runs in float32, each that far from float64 and half as far again on other processors.
    assert ours <= roundings_of(name) <= 3 * oracle


def test_the_rule_is_relative_to_scale_and_precision() -> None:
    values = torch.tensor([1.0, -8.0])
    assert tolerance(values, 1) == 8 * torch.finfo(torch.float32).eps
    for scale in (1e-6, 1.0, 1e6):
        assert_close(scale * (values + 1e-5), scale * values)
        with pytest.raises(AssertionError, match="rounding explains"):
            assert_close(scale * (values + 1e-4), scale * values)
    with pytest.raises(AssertionError, match="rounding explains"):
        assert_close(values + torch.nan, values)
    with pytest.raises(AssertionError, match="shapes"):
        assert_close(values[:1], values)


def test_what_is_masked_sets_no_scale() -> None:
    lowest = torch.finfo(torch.float32).min
    for masked in (lowest, -torch.inf):
        values = torch.tensor([1.0, masked])
        assert_close(values, values)
        with pytest.raises(AssertionError, match="rounding explains"):
            assert_close(torch.tensor([1.1, masked]), values)
        with pytest.raises(AssertionError, match="other values are masked"):
            assert_close(torch.tensor([1.0, 0.0]), values)
