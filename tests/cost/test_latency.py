"""Predicted times, and the costs of a block in symbols."""

from __future__ import annotations

import numpy as np
import torch

from deos_fx.cost.growth import Growth
from deos_fx.cost.latency import LatencyTable, in_turns
from deos_fx.cost.parts import BlockCost, at_most, heads_of


def test_times_are_linear_between_measured_counts() -> None:
    table = LatencyTable((1, 8, 64), (2.0, 3.0, 11.0))
    counts = [1, 5, 8, 30, 64]
    expected = np.interp(counts, table.counts, table.times).mean()
    assert abs(table.predict(counts).item() - expected) < 1e-5
    kept = torch.tensor(30.0, requires_grad=True)
    (slope,) = torch.autograd.grad(table.predict([kept, 64]), kept)
    assert abs(slope.item() - 8 / 56 / 2) < 1e-6


def test_every_count_is_measured_once_and_in_order() -> None:
    called = []
    run = LatencyTable.measure(
        [8, 1, 8], lambda count: lambda: called.append(count), torch.device("cpu")
    )
    assert run.counts == (1, 8)
    assert called == sorted(called) and set(called) == {1, 8}


def test_calls_take_turns() -> None:
    called: list[str] = []
    calls = [lambda name=name: called.append(name) for name in "ab"]
    times = in_turns(calls, torch.device("cpu"))
    assert len(times) == 2 and min(times) >= 0
    assert called == ["a", "b"] * (len(called) // 2) and len(called) > 2


def test_growth_is_found_from_a_few_lengths() -> None:
    attention = Growth(10, 2)
    assert attention.flops(3) == 3 * 10 + 2 * 9
    assert Growth.of_attention(attention.flops, 2, 4) == attention
    state = Growth(10, 0, constant=7, per_chunk=100, per_chunks=0, chunk=64)
    assert [state.flops(n) for n in (1, 64, 65)] == [117, 747, 857]
    both = Growth(10, 2, constant=-7, per_chunk=100, per_chunks=3, chunk=16)
    assert [Growth.of_state(growth.flops) for growth in (state, both)] == [state, both]
    tokens = torch.tensor(65.0, requires_grad=True)
    flops = state.flops(tokens)
    (slope,) = torch.autograd.grad(flops, tokens)
    assert (flops.item(), slope.item()) == (857, 10 + 100 / 64)


def test_what_a_score_observes_of_a_block() -> None:
    block = BlockCost(Growth(10.0, 2.0), heads=4, key_heads=2, dim=8, width=32)
    assert block.row_flops(1, 5) == 2 * 4 * 8 * 5
    assert block.projections == 2 * 32 * (4 + 2 + 2) * 8
    assert heads_of(torch.nn.Linear(2, 2)) == (0, 0, 0, 0)


def test_a_window_limits_what_is_seen() -> None:
    assert (at_most(9, None), at_most(9, 4), at_most(3, 4)) == (9, 4, 3)
    assert at_most(torch.tensor(9.0), 4).item() == 4
