"""Compute votes, which say whose attention to the visual tokens counts.

A score by attention is a mean over the tokens that attend, weighted by their votes: a token with
vote 0 takes no part. Also here: the text and the CLS token that scores compare with.

Shapes: B rows, N prompt positions, V visual tokens of a row, T = N - V others (text and padding),
I images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deos_fx.operator.scores import full_precision
from deos_fx.tokens.index import take

__all__ = [
    "class_feature",
    "for_images",
    "question_votes",
    "rater_votes",
    "text_key_size",
    "text_votes",
    "tower_votes",
    "without_class",
]

# How much shares of attention differ by rounding, relative to them.
_ROUNDING = 1e-5


def class_feature(hidden: Tensor) -> Tensor:
    """Return the CLS token [I, 1, d] of a vision tower's hidden states [I, 1 + V, d]."""
    return hidden[:, :1]


def without_class(x: Tensor, class_tokens: int) -> Tensor:
    """Return a vision tower's values [I, c + V, ...] without those of the c class tokens."""
    return x[:, class_tokens:]


def text_votes(attention_mask: Tensor, text: Tensor) -> Tensor:
    """Return votes of the text tokens at `text` [B, T]: attention_mask [B, N], 0 for padding.

    Returns:
        [B, T] in float32.
    """
    return take(attention_mask, text).float()


def question_votes(text: Tensor, visual: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return votes of the text after the images, the only text that has seen all of them.

    Args:
        text: [B, T] positions of everything that is not visual, ascending.
        visual: [B, V] positions of the visual tokens.
        attention_mask: None or [B, N] with 1 for real tokens.

    Returns:
        [B, T] in float32, 0 or 1; if no text is after the images, all text but padding votes.
    """
    # Attention is causal: text before an image, or between two, has not seen everything.
    real = torch.ones_like(text) if attention_mask is None else take(attention_mask, text)
    asked = (text > visual.amax(dim=1, keepdim=True)) & (real != 0)
    return (asked | (real != 0) & ~asked.any(dim=1, keepdim=True)).float()


def text_key_size(text_keys: Tensor, question: Tensor) -> Tensor:
    """Return the L1 norm [B, T] of the text's keys of all heads [B, T, H * D] (DART).

    Args:
        text_keys: [B, T, H * D].
        question: Votes [B, T]; text without a vote gets the lowest finite number.
    """
    # Pivots are the largest, so text without a vote is never one.
    size = full_precision(text_keys).abs().sum(dim=-1)
    return torch.where(question > 0, size, torch.finfo(size.dtype).min)


def rater_votes(
    embeddings: Tensor, text: Tensor, visual: Tensor, question: Tensor, alive: Tensor | None
) -> Tensor:
    """Return the votes of SparseVLM's raters: the text that relates to the image most.

    With embeddings H_v of the visual tokens and H_t of the question, m = mean_v softmax_t(H_v H_t')
    and the raters are those with m_t > mean(m). (Official code: Gumpest/SparseVLMs.)

    Args:
        embeddings: [B, N, d], the input of the first decoder layer.
        text: [B, T] positions.
        visual: [B, V] positions.
        question: [B, T], 1 for tokens that may be raters.
        alive: Gates [B, V] of the visual tokens; None for ones.

    Returns:
        [B, T] in float32, 0 or 1.
    """
    # 1. The share of each visual token's attention that goes to each word of the question.
    seen, asked = take(embeddings, visual).float(), take(embeddings, text).float()
    logits = (seen @ asked.mT).masked_fill(question[:, None] == 0, torch.finfo(torch.float32).min)
    called = logits.softmax(dim=-1)
    # 2. Its mean over the visual tokens.
    if alive is None:
        # Case: no gates, so all visual tokens count alike.
        called = called.mean(dim=1)
    else:
        # Case: visual tokens count by their gates.
        share = alive.float() / alive.float().sum(dim=1, keepdim=True)
        called = (share[:, None] @ called)[:, 0]
    # 3. The words above the average of the question.
    called = called * question
    average = called.sum(dim=1, keepdim=True) / question.sum(dim=1, keepdim=True)
    # Words that are alike are as high as their average, and all of them are raters: rounding must
    # not choose among them, since it differs from batch to batch.
    return ((called >= average * (1 - _ROUNDING)) & (question != 0)).float()


def tower_votes(alive: Tensor, class_tokens: int) -> Tensor:
    """Return votes [I, c + V] of a vision tower's tokens: gates [I, V], and 1 for class tokens."""
    return torch.nn.functional.pad(alive.float(), (class_tokens, 0), value=1.0)


def for_images(x: Tensor, images: int) -> Tensor:
    """Repeat values [B, ...] of each prompt for each of its images: [B * images, ...]."""
    return x[:, None].expand(-1, images, *x.shape[1:]).flatten(0, 1)
