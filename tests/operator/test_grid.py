"""Grids: anchors, windows and how counts fit into them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import TOKENS, grid, quick

from deos_fx import operator
from deos_fx.operator import SCORES
from deos_fx.operator.grid import grid_preference


@pytest.mark.parametrize(
    ("side", "count", "layout"),
    [(12, 16, (4, 4)), (12, 72, (6, 12)), (12, 18, (3, 6)), (12, 144, (12, 12)), (12, 1, (1, 1))],
)
def test_grid_layout(side: int, count: int, layout: tuple[int, int]) -> None:
    assert operator.grid_layout(side, side, count) == layout
    anchors = operator.grid_anchors(grid(side), count)
    assert anchors.shape == (1, count)
    assert (anchors.diff() > 0).all()


@quick
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 196))
def test_grid_layout_or_the_nearest_counts(height: int, width: int, count: int) -> None:
    try:
        down, across = operator.grid_layout(height, width, count)
    except ValueError as error:
        hint = str(error).split("keep one of ")[1]
        for near in map(int, hint.strip("[]").split(", ")):
            operator.grid_layout(height, width, near)
        return
    assert down * across == count and down <= height and across <= width


def test_grid_anchors_of_several_images_and_sparse_grids() -> None:
    both = operator.grid_anchors(grid(6, images=2), 8)[0].tolist()
    one = operator.grid_anchors(grid(6), 4)[0].tolist()
    assert both == one + [36 + anchor for anchor in one]
    every_other = torch.tensor([[0, 2 * r, 2 * c] for r in range(6) for c in range(6)])
    assert operator.grid_anchors(every_other, 4)[0].tolist() == one


def test_grid_anchors_refuse() -> None:
    with pytest.raises(ValueError, match="35 tokens are not 1 x 6 x 6"):
        operator.grid_anchors(grid()[1:], 4)
    with pytest.raises(ValueError, match="9 anchors do not split evenly over 2 images"):
        operator.grid_anchors(grid(6, images=2), 9)


def cells(height: int, width: int) -> torch.Tensor:
    """The grid of one image."""
    sides = torch.zeros(1, dtype=torch.int64), torch.arange(height), torch.arange(width)
    return torch.cartesian_prod(*sides)


@quick
@given(st.integers(1, 14), st.integers(1, 14), st.data())
def test_any_count_is_spread_over_any_grid(height: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, height * width))
    places = cells(height, width)
    (anchors,) = operator.grid_anchors(places, count).tolist()
    assert anchors == sorted({*anchors}) and len(anchors) == count and anchors[-1] < len(places)
    # Rows of anchors have equally many, or one more than others.
    rows = torch.tensor(anchors).div(width, rounding_mode="floor").unique(return_counts=True)[1]
    assert rows.max() - rows.min() <= 1
    # What is linear in place is interpolated exactly: at the centres of equal parts of a side.
    shares = operator.interpolation(places, count)[0]
    shares = shares.scatter(1, torch.tensor(anchors)[:, None], 1.0)
    means = (shares / shares.sum(dim=1, keepdim=True)) @ places[:, 1:].float()
    down = [(i + 0.5) * height / len(rows) - 0.5 for i in range(len(rows))]
    across = [(j + 0.5) * width / n - 0.5 for n in rows.tolist() for j in range(n)]
    expected = [torch.tensor(down).repeat_interleave(rows), torch.tensor(across)]
    assert torch.allclose(means, torch.stack(expected, dim=1), atol=1e-4)


def test_grid_preference_ranks_the_anchors_first() -> None:
    for count in (1, 4, 9, 18, 36):
        anchors = operator.grid_anchors(grid(), count)
        best = operator.top_k(grid_preference(grid(), count), None, count)
        assert torch.equal(operator.in_order(best), anchors)
    # A count that no division of the grid gives.
    preferred = grid_preference(grid(), 7)
    assert preferred.shape == (1, TOKENS)
    assert torch.equal((preferred[0] == 1).nonzero().mT, operator.grid_anchors(grid(), 7))
    two = grid_preference(grid(6, images=2), 15)
    assert (two == 1).sum() == 14
    assert torch.equal(grid_preference(grid()[1:], 7), SCORES["grid_coverage"].function(grid()[1:]))


def test_windows_must_be_equal() -> None:
    with pytest.raises(ValueError, match="8 windows do not split a grid of 6 x 6 tokens evenly"):
        operator.window_members(grid(), 8)
    with pytest.raises(ValueError, match="windows need complete grids, but 35 tokens"):
        operator.window_members(grid()[1:], 4)


def test_columns_are_the_tokens_of_a_row() -> None:
    assert operator.columns(torch.tensor([[0, r, c] for r in range(4) for c in range(7)])) == 7


def test_every_image_is_interpolated_for_itself() -> None:
    one, two = operator.interpolation(grid(), 4), operator.interpolation(grid(6, images=2), 8)
    assert one.shape == (1, 4, TOKENS) and two.shape == (1, 8, 2 * TOKENS)
    assert torch.equal(two[0], torch.block_diag(one[0], one[0]))
