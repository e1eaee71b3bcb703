"""Places and position ids of tokens, against lists of Python."""

from __future__ import annotations

import torch
from prompts import IMAGE, B, N, V, choice, prompt

from deos_fx import tokens

POSITIONS = torch.arange(N)[None]


def test_visual_tokens_and_text_share_the_prompt() -> None:
    ids, visual = prompt()
    assert torch.equal(tokens.visual_positions(ids, IMAGE, V), visual)
    other = torch.where(ids == IMAGE, IMAGE + torch.arange(N) % 2, ids)
    assert torch.equal(tokens.visual_positions(other, (IMAGE, IMAGE + 1), V), visual)
    text = tokens.text_tokens(visual, ids)
    assert torch.equal(torch.cat([visual, text], dim=1).sort().values, POSITIONS.expand(B, -1))


def test_ends_of_rows_are_no_visual_tokens() -> None:
    ids, visual = prompt()
    newline = torch.randn(4)
    features = torch.randn(B, N, 4)
    features[torch.arange(B), visual[:, 2]] = newline
    ends = tokens.is_separator(features, newline)
    found = tokens.visual_positions(ids, IMAGE, V - 1, ends)
    assert torch.equal(found, visual[:, [0, 1, 3, 4, 5]])


def test_the_last_token_is_no_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    hidden = torch.randn(3, 4, 2)
    assert tokens.last_token(hidden, mask)[:, 0].tolist() == [3, 2, 3]
    assert tokens.last_token(hidden, None)[:, 0].tolist() == [3, 3, 3]


def test_compact_positions_have_no_gaps() -> None:
    _, visual = prompt()
    origin = tokens.kept_in_prompt(visual, choice(), torch.empty(B, N, 1))
    moved = tokens.compact_positions(POSITIONS + 5, origin)
    assert torch.equal(moved, (POSITIONS[:, : origin.shape[1]] + 5).expand(B, -1))


def test_on_the_grid_only_what_follows_an_image_moves() -> None:
    # Two images of three tokens: of the first, the middle one stays, of the second the last one.
    visual = torch.tensor([[1, 2, 3, 5, 6, 7]])
    origin = torch.tensor([[0, 2, 4, 7, 8, 9]])
    positions = torch.arange(10)[None]
    trailing = tokens.trailing(origin, visual, positions, 2)
    assert trailing.nonzero()[:, 1].tolist() == [3]
    assert tokens.grid_positions(positions, trailing, origin).tolist() == [[0, 2, 3, 6, 7, 8]]
    assert tokens.shift_of(trailing).tolist() == [[1]]


def test_relaxed_positions_are_those_of_the_tokens_that_are_left() -> None:
    _, visual = prompt()
    kept = choice()
    whole = torch.empty(B, N, 1)
    origin = tokens.kept_in_prompt(visual, kept, whole)
    # Runners-up: all tokens are in the sequence, those that are not kept with closed gates.
    alive = torch.zeros(B, V).scatter(1, kept, 1.0) * 0.4 + 0.3
    every = torch.arange(N).expand(B, -1)
    is_open = tokens.are_open(alive, visual, whole)
    relaxed = tokens.relaxed_positions(POSITIONS, every, is_open)
    assert torch.equal(relaxed.gather(1, origin), tokens.compact_positions(POSITIONS, origin))
    trailing = tokens.trailing(origin, visual, POSITIONS, 2)
    assert torch.equal(tokens.trailing(every, visual, POSITIONS, 2, is_open), trailing)
