"""Encoders of which patches are dropped: groups, arguments of blocks, and what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

from deos_fx.errors import NoGroups
from deos_fx.models.arguments import arguments_at, axes_of
from deos_fx.models.groups import find_groups
from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.lower.patch_rows import parts_of
from deos_fx.passes.lower.reduced_encoder import LEFT, ReducedEncoder, left_in_tower
from deos_fx.passes.lower.reduced_patches import ReducedPatches
from deos_fx.passes.lower.steps import Step
from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.layout import PromptLayout

WIDTH = 4


class _Block(GradientCheckpointingLayer):
    """Adds the mean of all patches of a row, or of a segment, and a table to each of them."""

    def forward(self, hidden: Tensor, table: Tensor, borders: Tensor | None = None) -> Tensor:
        if borders is None:
            return hidden + hidden.mean(dim=-2, keepdim=True) + table
        parts = hidden.split(borders.diff().tolist())
        return torch.cat([part + part.mean(dim=0) for part in parts]) + table


class _Core(nn.Module):
    """Encodes rows of patches; `tail` makes visual tokens of them."""

    def __init__(self, tail: Any, between: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block() for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.tail = tail
        self.between = between or (lambda x: x)

    def encode(self, pixels: Tensor, borders: Tensor | None = None) -> Output:
        table = torch.arange(pixels.shape[-2], dtype=pixels.dtype)[:, None].expand(pixels.shape)
        for block in self.blocks:
            pixels = self.between(block(pixels, table, borders=borders))
        return Output(pooler_output=self.tail(pixels) * self.scale)


def pairs(hidden: Tensor) -> Tensor:
    return hidden.unflatten(-2, (-1, 2)).sum(dim=-2)


def groups_of(core: _Core, pixels: Tensor, **more: Any) -> Any:
    return find_groups(core, type(core).encode, [*core.blocks], (pixels,), more)


def test_groups_follow_the_order_of_tokens() -> None:
    backwards = _Core(lambda hidden: pairs(hidden).flip(-2))
    found = groups_of(backwards, torch.randn(2, 6, WIDTH))
    assert (found.shape, found.used) == ((2, 6), 3)
    assert found.groups[:3].tolist() == [[4, 5], [2, 3], [0, 1]]
    assert found.groups[3:].tolist() == [[10, 11], [8, 9], [6, 7]]


def test_patches_of_no_token_are_in_no_group() -> None:
    found = groups_of(_Core(lambda hidden: pairs(hidden[:, 2:])), torch.randn(1, 8, WIDTH))
    assert found.groups.tolist() == [[2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (_Core(lambda hidden: hidden - hidden.mean(dim=-2, keepdim=True)), "several visual tokens"),
        (_Core(lambda hidden: torch.cat([pairs(hidden[:, :4]), hidden[:, 4:]], 1)), "equally many"),
        (_Core(lambda hidden: hidden.detach()), "not made of the patches"),
        (_Core(lambda hidden: hidden * 0), "no patch"),
    ],
)
def test_what_cannot_be_followed_is_refused(core: _Core, reason: str) -> None:
    with pytest.raises(NoGroups, match=reason):
        groups_of(core, torch.randn(1, 6, WIDTH))


def test_groups_are_those_behind_the_last_change_between_blocks() -> None:
    found = groups_of(_Core(pairs, between=lambda x: x.flip(-2)), torch.randn(1, 6, WIDTH))
    assert (found.first, found.used) == (2, 3)
    assert found.groups.tolist() == [[4, 5], [2, 3], [0, 1]]


def test_features_of_blocks_before_a_change_are_refused() -> None:
    seen = list[Tensor]()

    def flipped(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.flip(-2)

    core = _Core(lambda hidden: pairs(hidden) + pairs(seen[-3]), between=flipped)
    with pytest.raises(NoGroups, match="change between its blocks"):
        groups_of(core, torch.randn(1, 6, WIDTH))


def test_patches_stay_up_to_the_last_block_that_knows_their_places() -> None:
    class Shifting(_Block):
        def forward(self, hidden: Tensor, table: Tensor, borders: Tensor | None = None) -> Tensor:
            return hidden + hidden.roll(1, dims=-2)

    core = _Core(pairs)
    core.blocks[1] = Shifting()
    found = groups_of(core, torch.randn(1, 6, WIDTH))
    assert (found.first, found.used) == (1, 3)
    assert found.before == "Shifting does something else with its tokens in another order"


def test_rows_are_divided_by_how_many_patches_are_left() -> None:
    left = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]])
    two, three = parts_of(left.float(), [2, 0, 2, 3])
    assert two.rows is not None and two.rows.tolist() == [0, 2]
    assert two.places.tolist() == [[0, 2], [1, 2]]
    assert three.places.tolist() == [[0, 1, 2]]
    (alone,) = parts_of(left[:1].float(), [2])
    assert alone.rows is None


# *** arguments of blocks ***


def test_arguments_are_restricted_by_their_shapes() -> None:
    hidden = torch.randn(2, 5, WIDTH)
    table, mask = torch.randn(1, 5, 3), torch.randn(2, 1, 5, 5)
    axes = axes_of(hidden, (table,), {"mask": mask, "scale": 2.0, "none": None})
    index = torch.tensor([[0, 3], [1, 4]])
    (kept, rows), named = arguments_at(
        index, axes, hidden, (table,), {"mask": mask, "scale": 2.0, "none": None}
    )
    for row, places in enumerate(index):
        assert torch.equal(kept[row], hidden[row, places])
        assert torch.equal(rows[row], table[0, places])
        assert torch.equal(named["mask"][row, 0], mask[row, 0, places][:, places])
    assert (named["scale"], named["none"]) == (2.0, None)
    # Some of the rows alone.
    (kept, _), named = arguments_at(
        index[1:],
        axes,
        hidden,
        (table,),
        {"mask": mask, "scale": 2.0, "none": None},
        torch.tensor([1]),
    )
    assert torch.equal(kept[0], hidden[1, [1, 4]])
    assert torch.equal(named["mask"][0, 0], mask[1, 0, [1, 4]][:, [1, 4]])


def test_cumulative_lengths_count_what_is_left() -> None:
    hidden, borders = torch.randn(7, WIDTH), torch.tensor([0, 2, 4, 7], dtype=torch.int32)
    axes = axes_of(hidden, (), {"borders": borders})
    index = torch.tensor([[0, 1, 5]])
    _, named = arguments_at(index, axes, hidden, (), {"borders": borders})
    # Nothing is left of the second segment.
    assert named["borders"].tolist() == [0, 2, 3]
    assert named["borders"].dtype == torch.int32


@pytest.mark.parametrize(
    "given", [torch.randn(3, 3), torch.randn(5, 3, 5), [torch.Size((1,)), object()]]
)
def test_unknown_arguments_are_refused(given: Any) -> None:
    with pytest.raises(NoGroups, match="its blocks are given a"):
        axes_of(torch.randn(5, WIDTH), (given,), {})


# *** the encoder ***


def encoder_of(core: _Core, reduction: Reduction, layout: PromptLayout) -> ReducedEncoder:
    step = Step(
        reduction,
        Site(reduction.site, "", "", ()),
        frozenset({"tokens"}),
        tuple(map(reduction.count, layout.sizes)),
    )
    return ReducedEncoder(core, type(core).encode, [*core.blocks], [step], layout)


def by_hand(core: _Core, pixels: Tensor, kept: Tensor, borders: list[int]) -> Tensor:
    """Tokens [K, d] of one row, of which patches are dropped after the first block."""
    table = torch.arange(len(pixels))[:, None]
    hidden, flags = core.blocks[0](pixels, table, borders=torch.tensor(borders)), kept
    left = [int(flags[a:b].sum()) for a, b in zip(borders, borders[1:], strict=False)]
    parts = torch.tensor([0, *left]).cumsum(0).unique()
    hidden, table = hidden[flags], table[flags]
    for block in core.blocks[1:]:
        hidden = block(hidden, table, borders=parts)
    return pairs(hidden)


def test_later_blocks_run_on_what_is_left() -> None:
    core, pixels = _Core(pairs), torch.randn(12, WIDTH)
    borders = torch.tensor([0, 4, 12])
    layout = PromptLayout(0, 1, (2, 3))
    reduction = Reduction("vision.0", 3, scores={"feature_norm": 1.0})
    output = encoder_of(core, reduction, layout)(pixels, borders=borders)
    (kept,) = left_in_tower(output, "kept")
    assert len(kept) == 3 and "mass" not in output[LEFT]
    flags = torch.isin(torch.arange(6), kept).repeat_interleave(2)
    expected = by_hand(core, pixels, flags, borders.tolist())
    assert_close(output.pooler_output[kept], expected)
    assert output[LEFT]["vision.0"]["kept"].shape == (1, 3)


def test_rows_may_keep_different_numbers() -> None:
    # One image in three rows of the tower.
    core, pixels = _Core(lambda hidden: pairs(hidden).flatten(0, 1)), torch.randn(3, 8, WIDTH)
    layout = PromptLayout(0, 1, (3, 4))
    reduction = Reduction("vision.0", 5, scores={"feature_norm": 1.0})
    output = encoder_of(core, reduction, layout)(pixels)
    (kept,) = left_in_tower(output, "kept")
    flags = torch.isin(torch.arange(12), kept).reshape(3, 4).repeat_interleave(2, dim=1)
    assert len({*flags.sum(dim=1).tolist()}) > 1
    for row in range(3):
        own = kept[(kept // 4) == row]
        if len(own):
            expected = by_hand(core, pixels[row], flags[row], [0, 8])
            assert_close(output.pooler_output[own], expected)


def test_other_numbers_of_tokens_are_refused() -> None:
    groups = groups_of(_Core(pairs), torch.randn(1, 10, WIDTH))
    with pytest.raises(ValueError, match="makes 5 visual tokens of patches, and a prompt has 4"):
        ReducedPatches(groups, PromptLayout(0, 1, (2, 2)))
