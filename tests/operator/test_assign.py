"""Similarities and assignments, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from site_inputs import TOKENS, grid, inputs
from torch.nn import functional as F

from deos_fx import operator

KEPT = torch.tensor([[2, 5, 30]])
REST = torch.tensor([[j for j in range(TOKENS) if j not in (2, 5, 30)]])


def test_nearest_gives_ties_to_the_first() -> None:
    similarity = torch.tensor([[[0.0, 1, 2], [0, 1, 3], [0, 0, 3]]])
    expected = torch.tensor([[[1.0, 1, 0], [0, 0, 1], [0, 0, 0]]])
    assert torch.equal(operator.nearest(similarity), expected)


def test_similarities_are_mixed_by_weight() -> None:
    tokens, _, features = inputs(0, rows=1)
    given = {"feature": tokens, "key": features["keys"], "grid": grid()}
    mixed = operator.similarity(given, {"feature": 0.5, "key": 2.0, "grid": 3.0}, KEPT, REST)
    for r, i in enumerate(KEPT[0].tolist()):
        for s, j in enumerate(REST[0].tolist()[:5]):
            distance = (grid()[i, 1:] - grid()[j, 1:]).float().norm()
            expected = 0.5 * F.cosine_similarity(tokens[0, i], tokens[0, j], 0)
            expected += 2 * F.cosine_similarity(given["key"][0, i], given["key"][0, j], 0)
            assert_close(mixed[0, r, s], expected + 3 / (1 + distance))


def test_places_of_different_images_are_far_apart() -> None:
    proximity = operator.similarity({"grid": grid(2, images=2)}, {"grid": 1.0})[0]
    assert (proximity[:4, 4:] == -1).all()
    assert (proximity[:4, :4] > 0).all()


def test_soft_assignments_lie_between_nearest_and_uniform() -> None:
    similarity = torch.randn(2, 3, 7)
    assert_close(operator.soft(similarity, 1e-4), operator.nearest(similarity))
    even = operator.uniform(torch.zeros(2, 3), torch.zeros(2, 7))
    torch.testing.assert_close(operator.soft(similarity, 1e5), even, atol=1e-4, rtol=0)
    assert_close(operator.soft(similarity, 0.3).sum(dim=1), torch.ones(2, 7))


@pytest.mark.parametrize("neighbours", [1, 4, TOKENS])
def test_nobody_is_a_neighbour_of_itself(neighbours: int) -> None:
    tokens, _, _ = inputs(0)
    kept = KEPT.expand(3, -1)
    assignment = operator.k_nearest(
        operator.similarity({"feature": tokens}, {"feature": 1.0}, kept), kept, neighbours
    )
    for row in range(3):
        for r, i in enumerate(KEPT[0].tolist()):
            others = [j for j in range(TOKENS) if j != i]
            others.sort(key=lambda j: -float(F.cosine_similarity(*tokens[row, [i, j]], 0)))
            assert assignment[row, r].nonzero()[:, 0].tolist() == sorted(others[:neighbours])
