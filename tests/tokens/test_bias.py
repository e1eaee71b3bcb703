"""Biases of attention logits: what a softmax makes of them."""

from __future__ import annotations

import torch
from closeness import assert_close
from prompts import B, N, V, prompt

from deos_fx import tokens


def test_a_bias_by_mass_counts_a_key_as_often_as_the_tokens_it_stands_for() -> None:
    _, visual = prompt()
    mass = torch.randint(1, 5, (B, V)).float()
    logits = torch.randn(B, N)
    bias = tokens.mass_bias(mass, visual, torch.empty(B, N, 1), 1.0)
    share = (logits + bias).softmax(dim=1)
    for row in range(B):
        times = torch.ones(N, dtype=torch.int64)
        times[visual[row]] = mass[row].long()
        repeated = logits[row].repeat_interleave(times).softmax(dim=0)
        expected = torch.stack([part.sum() for part in repeated.split(times.tolist())])
        assert_close(share[row], expected)


def test_a_gate_scales_what_is_attended_to() -> None:
    _, visual = prompt()
    alive, mass = torch.rand(B, V) + 0.1, torch.rand(B, V) + 1
    hidden, beta = torch.empty(B, N, 1), torch.tensor(0.5)
    bias = tokens.gate_bias(alive, mass, beta, visual, hidden)
    expected = torch.ones(B, N).scatter(1, visual, alive * mass.sqrt())
    assert_close(bias.exp(), expected)
    closed = tokens.gate_bias(torch.zeros(B, V), mass, beta, visual, hidden)
    assert closed.isfinite().all()
    assert (closed.gather(1, visual) < -10).all()


def test_in_a_tower_class_tokens_have_no_bias() -> None:
    mass = torch.rand(B, V) + 1
    ones = tokens.ones_like_tokens(mass[..., None])
    plain = tokens.patch_bias(mass, 1, 2.0)
    assert_close(plain, torch.nn.functional.pad(2 * mass.log(), (1, 0)))
    assert_close(tokens.patch_gate_bias(ones, mass, torch.tensor(2.0), 1), plain)
