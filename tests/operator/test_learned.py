"""Learned parts: their values by loops, and the same meaning on other grids and scales."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close
from site_inputs import SIDE, TEXT, TOKENS, WIDTH, grid, inputs
from torch import Tensor

from deos_fx.operator.learned import (
    LEARNED,
    linear_probe,
    place_preference,
    projected,
    quadratic_probe,
    text_probe,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


SIDES = torch.tensor([[SIDE, SIDE]])


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def test_probes_are_products_with_directions() -> None:
    tokens, _, _ = inputs(0)
    probe, form = normal(WIDTH), normal(WIDTH, 4)
    for row in range(3):
        for j in range(TOKENS):
            x = unit(tokens[row, j])
            assert_close(linear_probe(tokens, probe)[row, j], x @ probe)
            parts = [(x @ form[:, k]) ** 2 for k in range(4)]
            expected = parts[0] + parts[1] - parts[2] - parts[3]
            assert_close(quadratic_probe(tokens, form)[row, j], expected)


def test_text_probe_adds_what_every_word_asks() -> None:
    tokens, _, features = inputs(0)
    words, mask = features["text_tokens"], features["text_mask"]
    text = normal(WIDTH + WIDTH, 3)
    found = text_probe(tokens, words, mask, text)
    expected = torch.zeros(3, TOKENS)
    for row in range(3):
        for j in range(TOKENS):
            for t in range(TEXT):
                seen, asked = (
                    unit(tokens[row, j]) @ text[:WIDTH],
                    unit(words[row, t]) @ text[WIDTH:],
                )
                expected[row, j] += mask[row, t] * (seen @ asked)
    assert_close(found, expected)


def test_a_preference_by_place_is_a_cosine_series() -> None:
    place = normal(3, 2)
    found = place_preference(grid(), SIDES, place)[0]
    for j, (_, row, column) in enumerate(grid().tolist()):
        y, x = (row + 0.5) / SIDE, (column + 0.5) / SIDE
        terms = [
            float(place[m, n]) * math.cos(math.pi * m * y) * math.cos(math.pi * n * x)
            for m in range(3)
            for n in range(2)
        ]
        assert_close(found[j], torch.tensor(sum(terms)))


def test_a_preference_by_place_follows_the_tokens_of_each_row() -> None:
    place, order = normal(3, 2), torch.randperm(TOKENS)
    rows = torch.stack([grid(), grid()[order]])
    whole = place_preference(grid(), SIDES, place)[0]
    assert_close(place_preference(rows, SIDES, place), torch.stack([whole, whole[order]]))


def test_a_preference_by_place_carries_to_other_grids() -> None:
    place = normal(2, 2)
    coarse, fine = (
        place_preference(grid(side), torch.tensor([[side, side]]), place).view(side, side)
        for side in (4, 12)
    )
    # The centre of a cell of the coarse grid is that of three by three cells of the fine one.
    assert_close(fine[1::3, 1::3], coarse)


@pytest.mark.parametrize("name", [name for name, part in LEARNED.items() if part.scores])
def test_learned_scores_ignore_the_length_of_tokens(name: str) -> None:
    tokens, _, features = inputs(0)
    shapes = {"probe": (WIDTH,), "quadratic": (WIDTH, 4), "text": (2 * WIDTH, 3), "place": (2, 3)}
    part = LEARNED[name]
    for scale in (1.0, 100.0):
        features = features | {"tokens": scale * tokens}
        score = part.function(*(features[need] for need in part.needs), normal(*shapes[name]))
        if scale == 1:
            expected = score
    assert_close(score, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_learned_parts_work_in_single_precision(dtype: torch.dtype) -> None:
    tokens, _, _ = inputs(0)
    half = tokens.to(dtype)
    assert linear_probe(half, normal(WIDTH)).dtype == torch.float32
    assert projected(half, normal(WIDTH, 2)).dtype == torch.float32
    assert_close(projected(half, normal(WIDTH, 2)), half.float() @ normal(WIDTH, 2))


@pytest.mark.parametrize("name", LEARNED)
def test_values_grow_by_the_degree_of_a_row(name: str) -> None:
    tokens, _, features = inputs(0)
    row = LEARNED[name]
    given = {**features, "tokens": tokens, "sides": SIDES}
    shape = {"probe": (WIDTH,), "text": (2 * WIDTH, 2)}.get(name, (WIDTH, 2))
    part, needed = normal(*shape), [given[need] for need in row.needs]
    assert len(shape) == row.axes and row.scores == (name != "metric")
    assert_close(row.function(*needed, 3 * part), 3**row.degree * row.function(*needed, part))
