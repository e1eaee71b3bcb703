"""Indices of a choice of tokens, against lists of Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deos_fx.operator import gather

V = 9


def choices(seed: int, rows: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(V, generator=generator)[:count] for _ in range(rows)])


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, V))
def test_a_choice_and_the_others_are_all_tokens(seed: int, rows: int, count: int) -> None:
    kept, tokens = choices(seed, rows, count), torch.randn(rows, V, 2)
    flags, others = gather.chosen(kept, tokens), gather.others(kept, tokens)
    for row in range(rows):
        picked = kept[row].tolist()
        assert flags[row].nonzero()[:, 0].tolist() == sorted(picked)
        assert others[row].tolist() == [j for j in range(V) if j not in picked]
        assert gather.in_order(kept)[row].tolist() == sorted(picked)
        assert torch.equal(gather.take(tokens, kept)[row], tokens[row, picked])
        assert torch.equal(gather.take(tokens[..., 0], kept)[row], tokens[row, picked, 0])
    assert torch.equal(gather.listed(flags, count), gather.in_order(kept))


def test_one_row_serves_all() -> None:
    tokens, kept = torch.randn(3, V, 2), torch.tensor([[4, 1]])
    assert torch.equal(gather.take(tokens, kept), tokens[:, [4, 1]])
    assert torch.equal(
        gather.take(tokens[:1], kept.expand(3, -1)), tokens[:1, [4, 1]].expand(3, -1, -1)
    )
    assert torch.equal(gather.for_each_row(kept, tokens), kept.expand(3, -1))
    a, b = gather.same_rows(kept, torch.zeros(3, 5))
    assert a.shape == (3, 2) and b.shape == (3, 5)


@pytest.mark.parametrize("after", [0, 1])
@given(st.integers(0, 999), st.integers(2, V))
def test_the_last_token_takes_the_place_of_the_last_pick(after: int, seed: int, count: int) -> None:
    kept = choices(seed, 4, count)
    moved = gather.with_last(kept, torch.empty(4, V, 1), 2, after)
    for row in range(4):
        picks = kept[row].tolist()
        if row % 2:
            # The last image of a prompt.
            if V - 1 in picks:
                picks.remove(V - 1)
            else:
                picks.pop()
            picks.insert(count - 1 - after, V - 1)
        assert moved[row].tolist() == picks
