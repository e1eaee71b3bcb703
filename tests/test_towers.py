"""Groups of patches in vision towers: reductions against the original tower with masked keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import roundings_of
from families import IMAGE, prompts, shared
from masked import assert_pruning_is_masking
from masked_tower import tower_masked
from torch import Tensor

from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

NORM = {"scores": {"feature_norm": 1.0}}


# *** which patches make which token, by hand: flags of tokens -> flags [R, P] of patches ***


def in_runs(kept: Tensor) -> Tensor:
    """Each token is made of the next four patches; images are one row."""
    return kept.flatten().repeat_interleave(4)[None]


def in_windows(kept: Tensor) -> Tensor:
    """As `in_runs`, in the order of windows of 2 x 2 tokens of images of 4 x 8."""
    order = torch.arange(kept.numel()).reshape(-1, 2, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten()
    return in_runs(kept.flatten()[order])


def in_squares(kept: Tensor, width: int, first: int = 0, rows: int = 0) -> Tensor:
    """Each token is made of 2 x 2 patches of a grid, row by row; some patches are no token's."""
    grid = kept.reshape(len(kept), -1, width)
    patches = grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    patches = torch.cat([torch.ones(len(patches), first).bool(), patches], dim=1)
    return patches.reshape(rows, -1) if rows else patches


def in_one_row(kept: Tensor) -> Tensor:
    """Each token is a patch; all images are one row."""
    return kept.reshape(1, -1)


TOWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "qwen2_vl": in_runs,
    "qwen2_5_vl": in_windows,
    "qwen3_vl": in_runs,
    "qwen3_5": in_runs,
    "glm4v": in_runs,
    "internvl": functools.partial(in_squares, width=8, first=1),
    "idefics3": functools.partial(in_squares, width=8),
    "smolvlm": functools.partial(in_squares, width=8),
    "pixtral": in_one_row,
}


def reduce(name: str, *reductions: Reduction) -> ReducedModel:
    return ReducedModel(shared(name), Policy(reductions))


def masked(name: str, batch: dict[str, Tensor]) -> Callable[[Tensor], Any]:
    """The original tower without the keys of patches whose tokens are not alive."""

    def context(alive: Tensor) -> Any:
        kept = alive[batch["input_ids"] == IMAGE].reshape(len(alive), -1)
        return tower_masked(shared(name), 0, TOWERS[name](kept))

    return context


@pytest.mark.parametrize("name", TOWERS)
def test_dropped_groups_are_masked_keys(name: str) -> None:
    batch = prompts(name, 2)
    reduced = reduce(name, Reduction("vision.0", 0.25, **NORM))
    assert_pruning_is_masking(
        shared(name), reduced, batch, roundings_of(name), masked(name, batch)
    )
