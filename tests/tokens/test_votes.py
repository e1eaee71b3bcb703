"""Votes of the text and of a tower's tokens, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from prompts import B, N, V, prompt

from deos_fx import tokens

VISUAL = torch.tensor([[1, 2], [1, 2], [4, 5]])
TEXT = torch.tensor([[0, 3, 4, 5], [0, 3, 4, 5], [0, 1, 2, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])


def test_text_after_the_images_votes_or_all_of_it_where_there_is_none() -> None:
    votes = tokens.question_votes(TEXT, VISUAL, MASK)
    assert votes.tolist() == [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert tokens.question_votes(TEXT, VISUAL, None)[2].tolist() == [1, 1, 1, 1]
    assert tokens.text_votes(MASK, TEXT).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]


def test_raters_are_called_up_more_than_average() -> None:
    _, visual = prompt()
    embeddings = torch.randn(B, N, 8)
    text = tokens.text_tokens(visual, embeddings)
    question = torch.ones(text.shape)
    question[:, :2] = 0
    alive = torch.rand(B, V)
    votes = tokens.rater_votes(embeddings, text, visual, question, alive)
    for row in range(B):
        asked = embeddings[row, text[row, 2:]]
        called = sum(
            gate * (asked @ embeddings[row, place]).softmax(dim=0)
            for gate, place in zip(alive[row], visual[row], strict=True)
        )
        assert votes[row].tolist() == [0, 0, *(called > called.mean()).float().tolist()]


@pytest.mark.parametrize("padding", range(4))
def test_a_word_that_is_average_is_a_rater_whatever_rounding_says(padding: int) -> None:
    # Each visual token calls up one word: 6 of 54 the first of nine, which is the average.
    calls = torch.tensor([6, 30, 5, 4, 3, 2, 2, 1, 1])
    words = torch.eye(9) * 300
    seen = words.repeat_interleave(calls, dim=0)
    embeddings = torch.cat([torch.zeros(padding, 9), seen, words])[None]
    visual = torch.arange(54)[None] + padding
    text = torch.cat([torch.arange(padding), torch.arange(9) + padding + 54])[None]
    question = (text >= padding).float()
    votes = tokens.rater_votes(embeddings, text, visual, question, None)
    assert votes[0, padding:].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_text_that_asks_nothing_has_the_smallest_keys() -> None:
    keys, question = torch.randn(B, 4, 6), torch.tensor([[0.0, 1, 1, 1]]).expand(B, -1)
    size = tokens.text_key_size(keys, question)
    assert torch.equal(size[:, 1:], keys.abs().sum(-1)[:, 1:])
    assert (size[:, 0] < size[:, 1:].amin(dim=1)).all()


def test_class_tokens_always_vote() -> None:
    hidden, alive = torch.randn(B, 1 + V, 4), torch.rand(B, V)
    assert torch.equal(tokens.tower_votes(alive, 1)[:, :1], torch.ones(B, 1))
    assert torch.equal(tokens.without_class(tokens.tower_votes(alive, 1), 1), alive)
    assert torch.equal(tokens.class_feature(hidden), hidden[:, :1])
    assert torch.equal(tokens.for_images(alive, 2)[[0, 1]], alive[[0, 0]])
