"""Indices into prompts, against lists of Python."""

from __future__ import annotations

import pytest
import torch
from prompts import B, K, N, V, choice, prompt

from deos_fx import tokens


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("rows", [1, B])
def test_take_is_indexing_row_by_row(dim: int, rows: int) -> None:
    x = torch.randn(rows, N, 4) if dim == 1 else torch.randn(rows, 4, N)
    index = torch.randint(0, N, (B, 5))
    taken = tokens.take(x, index, dim)
    for row in range(B):
        expected = x[min(row, rows - 1)].index_select(0 if dim == 1 else 1, index[row])
        assert torch.equal(taken[row], expected)


def test_parts_without_an_axis_of_tokens_stay() -> None:
    table, scale, index = torch.randn(1, N, 4), torch.randn(2), torch.tensor([[3, 7]])
    taken, same = tokens.take_each((table, scale), index, (1, None))
    assert torch.equal(taken, table[:, [3, 7]])
    assert same is scale
    coordinates = torch.randn(3, 1, N)
    assert torch.equal(tokens.take_in_each(coordinates, index), coordinates[:, :, [3, 7]])


def test_masks_are_restricted_on_every_axis_of_tokens() -> None:
    index = torch.tensor([[0, 2, 5]])
    four, two = torch.rand(1, 2, N, N) > 0.5, torch.rand(1, N) > 0.5
    restricted, padding = tokens.take_mask(four, index), tokens.take_mask(two, index)
    assert torch.equal(restricted, four[:, :, [0, 2, 5]][:, :, :, [0, 2, 5]])
    assert torch.equal(padding, two[:, [0, 2, 5]])
    assert tokens.take_mask(None, index) is None


def test_what_stays_of_a_prompt_is_its_text_and_the_kept_tokens() -> None:
    (_, visual), kept = prompt(), choice()
    hidden = torch.randn(B, N, 4)
    index = tokens.kept_in_prompt(visual, kept, hidden)
    after = tokens.visual_after(visual, kept)
    for row in range(B):
        stays = visual[row, kept[row]].tolist()
        gone = set(visual[row].tolist()) - set(stays)
        left = [place for place in range(N) if place not in gone]
        assert index[row].tolist() == left
        assert after[row].tolist() == [left.index(place) for place in stays]


def test_tokens_are_put_where_they_belong_in_the_precision_of_the_prompt() -> None:
    hidden, new = torch.randn(B, N, 4, dtype=torch.bfloat16), torch.randn(B, K, 4)
    visual = choice()
    expected = hidden.clone()
    for row in range(B):
        expected[row, visual[row]] = new[row].bfloat16()
    assert torch.equal(tokens.put(hidden, visual, new), expected)


def test_choices_of_images_are_choices_of_their_prompt() -> None:
    kept = torch.tensor([[0, 3], [1, 2], [2, 5], [0, 1]])
    assert tokens.kept_of_prompt(kept, 2, V).tolist() == [[0, 3, 7, 8], [2, 5, 6, 7]]
    assert tokens.first_of_prompt(kept, 2, V).tolist() == [[0, 1, 6, 7]] * 2
    assert tokens.last_of_prompt(kept, 2, V).tolist() == [[4, 5, 10, 11]] * 2


def test_choices_of_choices_keep_the_mark_of_a_class_token() -> None:
    before, kept = torch.tensor([[-1, 2, 4, 5]]), torch.tensor([[-1, 0, 3]])
    assert tokens.kept_of_kept(before, kept).tolist() == [[-1, -1, 5]]
    values = torch.randn(1, 4, 2)
    assert torch.equal(tokens.known_of_kept(values, kept), values[:, [0, 0, 3]])


def test_images_and_prompts_are_each_other_s_inverse() -> None:
    x, mass = torch.randn(B, 2 * V, 4), torch.rand(B, 2 * V)
    split = tokens.of_images(x, 2)
    assert torch.equal(split[2 * 1 + 1], x[1, V:])
    assert torch.equal(tokens.of_prompts(split, 2), x)
    assert torch.equal(tokens.masses_of_prompt(mass.reshape(2 * B, V), 2), mass)


def test_patches_are_replaced_after_the_class_tokens() -> None:
    hidden, patches = torch.randn(B, 1 + V, 4), torch.randn(B, K, 4)
    left = tokens.with_patches(hidden, patches, 1)
    assert torch.equal(left, torch.cat([hidden[:, :1], patches], dim=1))
