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


def test_random_is_the_noise_that_saved_policies_were_made_with() -> None:
    for image, row, column, seed in ((0, 0, 0, 0), (0, 3, 5, 1), (2, 23, 17, 10**9), (1, 0, 7, -4)):
        value = image * 10007 + row * 1009 + column + 1
        for _ in range(4):
            value = (value**2 + value * 31 + seed * 7919 + 12345) % (2**31 - 1)
        place = torch.tensor([[image, row, column]])
        noise = SCORES["random"].function(place, torch.tensor(seed))
        assert noise.tolist() == [pytest.approx([value / (2**31 - 1)], rel=1e-6)]
        assert torch.equal(SCORES["random"].function(place[None], torch.tensor(seed)), noise)


def test_grid_coverage_is_the_threshold_of_bayer() -> None:
    # The recursion of the matrix: M(2n) = [[4 M, 4 M + 2], [4 M + 3, 4 M + 1]].
    bayer = torch.zeros(1, 1)
    for _ in range(6):
        bayer = torch.cat(
            [torch.cat([4 * bayer, 4 * bayer + 2], 1), torch.cat([4 * bayer + 3, 4 * bayer + 1], 1)]
        )
    score = SCORES["grid_coverage"].function(grid(64))
    assert_close(-score.view(64, 64), bayer / 64**2)
    # Beyond that it repeats, and each image has its own.
    assert torch.equal(SCORES["grid_coverage"].function(grid(64) + 64), score)


def test_norms_are_those_of_a_loop() -> None:
    _, _, features = inputs(0)
    keys, joint = features["keys"], features["joint_keys"]
    assert_close(SCORES["key_norm"].function(keys)[1, 2], keys[1, 2].norm())
    assert_close(SCORES["key_l1_norm"].function(joint)[1, 2], sum(map(abs, joint[1, 2])))
    agreed = SCORES["agreed_attention"].function(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    assert agreed.tolist() == [[6.0]]


def test_text_relevance_is_the_mean_cosine_to_the_words_that_count() -> None:
    tokens, _, features = inputs(0)
    text, mask = features["text_tokens"], features["text_mask"]
    value = SCORES["text_relevance"].function(tokens, text, mask)
    for row in range(3):
        words = [word for word, counts in zip(text[row], mask[row], strict=True) if counts]
        cosines = [F.cosine_similarity(tokens[row], word, -1) for word in words]
        assert_close(value[row], sum(cosines) / len(cosines))
    assert torch.equal(SCORES["text_irrelevance"].function(tokens, text, mask), -value)
    # Without a word, nothing is relevant.
    assert not SCORES["text_relevance"].function(tokens, text, 0 * mask).any()


def test_combine_is_a_weighted_sum() -> None:
    first, second = torch.randn(2, 5), torch.randn(2, 5)
    assert_close(operator.combine([first, second], [0.5, 2.0]), 0.5 * first + 2 * second)


def test_standardize_is_a_z_score() -> None:
    score = torch.tensor([[1.0, 2.0, 6.0], [1e6, 1e6 + 1, 1e6 + 2]])
    z = operator.standardize(score, torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]]))
    mean, deviation = 15 / 4, math.sqrt((1 + 4 + 72) / 4 - (15 / 4) ** 2)
    assert_close(z[0], (score[0] - mean) / deviation)
    # With a deviation of the size of rounding errors, 1e-6 of the scores, it stays below 1.
    assert_close(z[1], torch.tensor([-1.0, 0.0, 1.0]) / math.sqrt(2 / 3 + 1.000001**2))
    # Nothing counts.
    assert operator.standardize(score, torch.zeros(2, 3)).isfinite().all()


def test_flags_of_tables_are_flags() -> None:
    rows = [*SCORES.values(), *operator.SELECTORS.values()]
    flags = ("compares", "searched", "signed", "relaxed", "flags")
    values = [getattr(row, flag) for row in rows for flag in flags if hasattr(row, flag)]
    assert {*map(type, values)} == {bool}
    searched = {name for name, row in SCORES.items() if row.searched}
    assert searched == {
        "last_text_attention",
        "text_attention",
        "cls_attention",
        "feature_norm",
        "key_norm",
        "novelty",
        "grid_coverage",
    }
