"""A soft choice of the largest: its sum, its limit and its gradients."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import TOKENS, quick, seeds
from torch.nn import functional as F

from deos_fx import operator
from deos_fx.forms.soft_top_k import soft_top_k


@quick
@given(seeds, st.floats(0, 1), st.floats(1e-4, 10), st.booleans())
def test_soft_top_k_sums_to_the_count(
    seed: int, fraction: float, temperature: float, partial: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(4, TOKENS, generator=generator, dtype=torch.float64)
    alive = torch.rand(score.shape, generator=generator, dtype=torch.float64) ** 0.2
    alive = alive if partial else torch.ones_like(alive)
    count = fraction * alive.sum(-1)
    gates = soft_top_k(score, count, temperature, alive)
    # A count of 0 has no scale.
    torch.testing.assert_close(gates.sum(-1), count, atol=1e-9, rtol=0)
    assert (gates >= 0).all() and (gates <= alive).all()


@quick
@given(seeds, st.integers(0, TOKENS))
def test_soft_top_k_hardens_to_top_k(seed: int, count: int) -> None:
    noise = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(seed))
    score = noise.argsort(dim=-1) / TOKENS
    gates = soft_top_k(score, count, 1e-6, torch.ones_like(score))
    expected = F.one_hot(operator.top_k(score, None, count), TOKENS).sum(1).float()
    assert_close(gates, expected, 8)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_soft_top_k_gradients(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    alive = torch.rand(3, 9, generator=generator, dtype=torch.float64) * 0.5 + 0.4
    count = torch.tensor([0.7, 2.5, 4.0], dtype=torch.float64, requires_grad=True)
    values = (score, count, alive.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, c, a: soft_top_k(s, c, temperature, a), values, atol=1e-6
    )


def test_soft_top_k_gradient_to_the_count_survives_saturation() -> None:
    score = torch.arange(6.0).unsqueeze(0)
    for count in (0.0, 3.0, 6.0):
        wanted = torch.tensor(count, requires_grad=True)
        gates = soft_top_k(score, wanted, 1e-5, torch.ones(1, 6))
        (slope,) = torch.autograd.grad(gates.sum(), wanted)
        assert_close(slope, torch.tensor(1.0))
