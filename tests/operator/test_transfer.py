"""What kept tokens receive: the formulas, one receiver at a time."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close

from deos_fx import operator

B, V, K, WIDTH = 2, 7, 3, 4
KEPT = torch.tensor([[0, 3, 5], [1, 2, 6]])
SOURCES = torch.tensor([[1, 2, 4, 6], [0, 3, 4, 5]])
TOKENS, MASS, WEIGHT = torch.randn(B, V, WIDTH), torch.rand(B, V) + 0.5, torch.rand(B, V)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gain", [0.3, 1.0])
@pytest.mark.parametrize("receivers", [2, K])
def test_receivers_are_the_mean_of_what_they_stand_for(
    exponent: float, gain: float, receivers: int
) -> None:
    assignment = torch.rand(B, receivers, len(SOURCES[0]))
    merged = operator.merge(
        TOKENS, KEPT, SOURCES, assignment, mass=MASS, weight=WEIGHT, gain=gain, exponent=exponent
    )
    masses = operator.merged_mass(KEPT, SOURCES, assignment, MASS, gain)
    alone = K - receivers
    for row in range(B):
        for k, i in enumerate(KEPT[row].tolist()):
            own = total = MASS[row, i]
            content, mass = own * TOKENS[row, i], own
            for s, j in enumerate(SOURCES[row].tolist() if k >= alone else []):
                share = gain * assignment[row, k - alone, s] * MASS[row, j]
                content = content + share * WEIGHT[row, j] * TOKENS[row, j]
                total, mass = total + share * WEIGHT[row, j], mass + share
            assert_close(merged[row, k], content / own * (own / total) ** exponent)
            assert_close(masses[row, k], mass)


def test_the_rest_goes_to_one_token() -> None:
    slot = operator.slot_of(KEPT, KEPT[:, 1:2])
    assert slot.tolist() == [[0, 1, 0]] * B
    assignment = torch.rand(B, K, len(SOURCES[0]))
    shared = operator.rest(assignment, slot, SOURCES, 0.25)
    assert_close(shared[:, 0], 0.25 * assignment[:, 0])
    assert_close(shared[:, 1], 0.25 * assignment[:, 1] + 0.75)
    assert torch.equal(operator.rest(None, slot, SOURCES, 0.0)[:, 1], torch.ones(B, 4))
    own = operator.own_part(slot, KEPT, WEIGHT)
    assert torch.equal(own[:, 1], WEIGHT.gather(1, KEPT[:, 1:2])[:, 0])
    assert (own[:, [0, 2]] == 1).all()


def test_the_rest_beside_others_is_every_dropped_token_whole() -> None:
    slot = operator.slot_of(KEPT, KEPT[:, :1])
    assignment = torch.rand(B, K, V)
    shared = operator.rest_beside(assignment, slot, KEPT, 0.5)
    for row in range(B):
        assert shared[row, 0].nonzero()[:, 0].tolist() == SOURCES[row].tolist()
    assert_close(shared[:, 1:], 0.5 * assignment[:, 1:])


def test_kept_tokens_are_scaled_and_the_class_token_comes_first() -> None:
    score, kept = torch.randn(B, V), torch.randn(B, K, WIDTH, dtype=torch.bfloat16)
    scaled = operator.reweight(kept.float(), score, KEPT, 0.2)
    assert_close(scaled, kept.float() * (1 + 0.2 * score.gather(1, KEPT))[..., None])
    first = torch.randn(B, 1, WIDTH)
    joined = operator.with_class(kept, first)
    assert torch.equal(joined, torch.cat([first.bfloat16(), kept], dim=1))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_a_token_stays_where_all_weights_are_zero(exponent: float) -> None:
    """As where no text attends to the residual token, nor to any that it stands for."""
    weight, own = torch.zeros_like(WEIGHT), torch.tensor([[1.0, 1.0, 0.0]] * B)
    for mass in (None, MASS):
        for assignment in (torch.rand(B, K, len(SOURCES[0])), torch.zeros(B, K, 0)):
            moved = SOURCES[:, : assignment.shape[-1]]
            merged = operator.merge(
                TOKENS, KEPT, moved, assignment, own, mass, weight, exponent=exponent
            )
            assert_close(merged, operator.take(TOKENS, KEPT))


def test_where_nothing_moves_the_own_part_remains() -> None:
    tokens, kept, own = torch.randn(2, 5, 3), torch.tensor([[0, 2, 4]] * 2), torch.rand(2, 2) + 1
    nothing = torch.zeros(2, 2, 0)
    stays = operator.merge(tokens, kept, None, nothing, own, exponent=0.25)
    assert_close(stays[:, 0], tokens[:, 0])
    assert_close(stays[:, 1:], tokens[:, [2, 4]] * own.unsqueeze(-1) ** 0.75)
    for plain in (
        operator.merge(tokens, kept, None, nothing, own),
        operator.merge(tokens, kept, None, nothing, exponent=0.25),
    ):
        assert torch.equal(plain, tokens[:, [0, 2, 4]])
