"""Scores: properties of all of them, and the values of some."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import TOKENS, grid, inputs, quick, seeds
from torch import Tensor
from torch.nn import functional as F

from deos_fx import operator
from deos_fx.operator import SCORES


def _score(name: str, features: dict[str, Tensor]) -> Tensor:
    """A score with its options at their defaults."""
    options = {key: torch.tensor(value) for key, value in {"seed": 0}.items()}
    return SCORES[name].function(*((features | options)[need] for need in SCORES[name].needs))


@pytest.mark.parametrize("name", SCORES)
@quick
@given(seed=seeds)
def test_scores_are_permutation_equivariant(name: str, seed: int) -> None:
    tokens, _, features = inputs(seed)
    features = {**features, "tokens": tokens, "grid": features["grid"].expand(3, -1, -1)}
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    plain = _score(name, features)
    shuffled = {
        need: value[:, order] if value.shape[1] == TOKENS else value
        for need, value in features.items()
    }
    assert_close(_score(name, shuffled), plain[:, order])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_in_single_precision(name: str, dtype: torch.dtype) -> None:
    tokens, _, features = inputs(0)
    features = {name: value.to(dtype) for name, value in features.items() if name != "grid"}
    features |= {"tokens": tokens.to(dtype), "grid": grid()}
    score = _score(name, features)
    assert score.dtype == torch.float32


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_may_be_negative_say_so(name: str) -> None:
    tokens, _, features = inputs(0)
    features |= {need: x.abs() for need, x in features.items() if need.startswith("attention")}
    score = _score(name, {**features, "tokens": tokens, "grid": grid()})
    assert SCORES[name].signed == bool((score < 0).any())


def test_novelty_is_the_distance_to_the_nearest() -> None:
    tokens, _, _ = inputs(0, rows=1)
    for j, value in enumerate(operator.SCORES["novelty"].function(tokens)[0]):
        others = [F.cosine_similarity(tokens[0, j], tokens[0, i], 0) for i in range(TOKENS)]
        assert_close(value, -max(others[:j] + others[j + 1 :]))


def test_novelty_ignores_tokens_that_are_gone() -> None:
    tokens, _, _ = inputs(0)
    alive = torch.ones(3, TOKENS)
    alive[:, 20:] = 0
    novelty = SCORES["novelty"].function
    assert_close(novelty(tokens, alive)[:, :20], novelty(tokens[:, :20]))


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_grid_coverage_spreads_evenly_at_any_count(count: int) -> None:
    places = grid(8)
    best = operator.top_k(SCORES["grid_coverage"].function(places), None, count)[0]
    side = math.isqrt(count)
    cells = {(int(r) * side // 8, int(c) * side // 8) for _, r, c in places[best]}
    assert len(cells) == count


@quick
@given(seeds, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_standardize_forgets_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    score = inputs(seed, dtype=torch.float64)[2]["attention_last"]
    z = operator.standardize(score)
    # What may be rounding is no deviation: 1e-6 of the scores.
    assert_close(1 + z.mean(-1).float(), torch.ones(3))
    assert_close(z.std(-1, correction=0).float(), torch.ones(3))
    moved = operator.standardize(scale * (score + offset))
    # With the offset, a part of the deviation may be rounding.
    torch.testing.assert_close(moved, z, atol=1e-2, rtol=1e-2)


def test_standardize_makes_no_noise_of_a_constant() -> None:
    for value in (0.0, 0.1, 1 / 576, 1e4):
        assert operator.standardize(torch.full((2, 576), value)).abs().max() < 0.5


def test_standardize_over_the_living_only() -> None:
    score = torch.randn(2, 10)
    alive = torch.ones(2, 10)
    alive[:, 6:] = 0
    expected = operator.standardize(score[:, :6])
    assert_close(operator.standardize(score, alive)[:, :6], expected)
