"""The layout of a prompt: sizes, grids and the rule for positions."""

from __future__ import annotations

import pytest
import torch

from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.layout import PromptLayout, grid_after, grid_of_prompt, rule_before_decoder

MIXED = PromptLayout(9, 3, (2, 3), grids=((2, 3), (1, 4), (2, 3)))


def test_cells_are_counted_image_by_image_in_the_order_of_reading() -> None:
    cells = MIXED.grid_tensor(2).tolist()
    assert cells[:6] == [[0, row, column] for row in range(2) for column in range(3)]
    assert cells[6:] == [[1, 0, column] for column in range(4)]


def test_images_of_one_size_are_found_together() -> None:
    assert MIXED.sizes == (6, 4, 6)
    assert MIXED.alike() == [[0, 2], [1]]
    with pytest.raises(ValueError, match="have 6, 4, 6 visual tokens"):
        _ = MIXED.tokens_per_image
    assert PromptLayout(9, 3, (2, 3)).tokens_per_image == 6


def test_only_anchors_of_the_grid_are_known_without_an_input() -> None:
    grid = PromptLayout(9, 1, (4, 4)).grid_tensor(1)
    kept = grid_after(Reduction("projector", 4, selector="grid"), 4, grid)
    assert kept is not None
    assert len({(row // 2, column // 2) for _, row, column in kept.tolist()}) == 4
    assert grid_after(Reduction("projector", 4), 4, grid) is None
    both = grid_of_prompt(kept, 2)
    assert torch.equal(both[4:] - both[:4], torch.tensor([[1, 0, 0]] * 4))


def test_the_rule_that_moves_tokens_furthest_holds() -> None:
    def rule(*positions: str) -> str:
        sites = [f"vision.{i}" for i in range(len(positions))]
        steps = [
            Reduction(site, 4, position=position)
            for site, position in zip(sites, positions, strict=True)
        ]
        return rule_before_decoder([*steps, Reduction("decoder.1", 2, position="compact")])

    assert rule() == "keep"
    assert rule("keep", "grid") == "grid"
    assert rule("compact", "grid", "keep") == "compact"
