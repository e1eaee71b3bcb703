"""Layers that rotate what they hold anew, and keep the angles of it themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from deos_fx.models.upstream import CACHE
from deos_fx.passes.capture.key_angles import ANGLES, keeping_angles
from deos_fx.tokens.cache import ReducedCache


class Telling(nn.Module):
    """A layer that returns the angles that it is given."""

    def forward(self, hidden: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        cosines, sines = given[ANGLES]
        return cosines, sines


def angles(tokens: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, tokens, 4), torch.randn(rows, tokens, 4)


def test_a_layer_gets_the_angles_of_all_that_it_holds() -> None:
    layers = [keeping_angles(Telling(), index) for index in range(2)]
    cache, hidden = ReducedCache(LlamaConfig(num_hidden_layers=2)), torch.zeros(2, 5, 8)
    # The second layer has fewer tokens of the prompt.
    prompts, new = [angles(5), angles(3)], angles(1)
    for layer, own in zip(layers, prompts, strict=True):
        first = layer(hidden, **{ANGLES: own, CACHE: cache})
        assert all(map(torch.equal, first, own))
    for layer, own in zip(layers, prompts, strict=True):
        both = layer(hidden, **{ANGLES: new, CACHE: cache})
        for part, old, later in zip(both, own, new, strict=True):
            assert torch.equal(part, torch.cat([old, later], dim=1))


def test_without_a_cache_there_is_nothing_to_keep() -> None:
    given = angles(3)
    for arguments in ({}, {CACHE: None}):
        found = keeping_angles(Telling(), 0)(torch.zeros(2, 3, 8), **{ANGLES: given}, **arguments)
        assert found[0] is given[0] and found[1] is given[1]


def test_positions_of_all_rows_at_once_meet_those_of_each() -> None:
    layer, cache = keeping_angles(Telling(), 0), ReducedCache(LlamaConfig(num_hidden_layers=1))
    hidden, common, own = torch.zeros(2, 3, 8), angles(3, rows=1), angles(1)
    layer(hidden, **{ANGLES: common, CACHE: cache})
    cosines, sines = layer(hidden, **{ANGLES: own, CACHE: cache})
    assert torch.equal(cosines[:, :3], common[0].expand(2, -1, -1))
    assert torch.equal(sines[:, 3:], own[1])
