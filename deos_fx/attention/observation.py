"""Observations that a block can report of its attention, and the features made of them.

The attention that keys receive from some queries is computed row by row, never as a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "MADE_OF",
    "OBSERVED",
    "Asked",
    "AttentionView",
    "Observation",
    "observe",
    "received_attention",
]


@dataclass(frozen=True)
class Observation:
    """An observation that a block reports of its attention, in addition to its own output.

    Attributes:
        kind: ``attention`` (received by every key from some queries, [B, N]), ``keys`` (mean over
            heads, [B, N, D]) or ``joint_keys`` (heads side by side, [B, N, H_kv D]).
        heads: How the attention of all heads becomes one: their ``mean``, their ``max`` (FitPrune),
            or ``joint``, a single softmax over full-width products, scaled by (H D)^-1/2
            (PruMerge).
        strongest: How many heads count: those that attend most to the keys that count
            (SparseVLM+); 0 for all.
        gravity: Whether attention is divided by the value that rotary positions alone give each
            distance (SparseVLM+).
    """

    kind: Literal["attention", "keys", "joint_keys"] = "attention"
    heads: Literal["mean", "max", "joint"] = "mean"
    strongest: int = 0
    gravity: bool = False


Asked = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The queries of an observation: their positions [B, R] (None for all), their votes [B, R] (None
for equal ones) and, for ``Observation.strongest``, positions [B, V] of the keys that count.
"""


# SparseVLM+ reads the 14 heads that attend most to the image, of the 28 or 32 in its models.
_STRONGEST_HEADS = 14

OBSERVED: Mapping[str, tuple[Observation, str]] = {
    "keys": (Observation("keys"), ""),
    "joint_keys": (Observation("joint_keys"), ""),
    "text_keys": (Observation("joint_keys"), ""),
    "attention_cls": (Observation(), "class"),
    "attention_cls_joint": (Observation(heads="joint"), "class"),
    "attention_last": (Observation(), "last"),
    "attention_text": (Observation(), "text"),
    "attention_text_max": (Observation(heads="max"), "text"),
    "attention_raters": (Observation(), "raters"),
    "attention_raters_plus": (
        Observation(strongest=_STRONGEST_HEADS, gravity=True),
        "raters",
    ),
    "attention_mutual": (Observation(), "visual"),
    "attention_mutual_max": (Observation(heads="max"), "visual"),
}
"""Feature of attention -> its observation and the kind of its queries; a new one is a row here."""

MADE_OF = {"text_score": "text_keys"}
"""Feature -> the feature in ``OBSERVED`` that it is computed from."""


# *** the computation ***

# Number of queries whose rows of attention [heads, keys] are held in memory at once.
_QUERIES_AT_ONCE = 64

# Floor of the sum of votes. If all are zero, the result is zero and not NaN.
_NO_VOTES = 1e-13


@dataclass(frozen=True)
class AttentionView:
    """The arguments of an attention function.

    Attributes:
        query: [B, H, N, D] after rotary embedding.
        key: [B, H_kv, N, D]; H is a multiple of H_kv.
        mask: None, [B, N] of real keys, boolean or additive, broadcastable to [B, H, N, N], or
            flex_attention's BlockMask.
        scale: Factor of the logits.
        causal: Whether a query sees only keys up to its position; a mask of pairs overrides it.
        tables: Rotary cosines and sines [B or 1, N, D], if the block is given any.
        bias: [B, H, N, N] that the block adds to the logits, if it makes any.
        observed: How many keys are observed, the last ones; None for all. Keys of earlier turns
            take their share of the attention, and are not observed.
        sinks: [H] logits that take their share of the attention of each head and are no keys, if
            there are any.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | BlockMask | None
    scale: float
    causal: bool
    tables: Any = None
    bias: Tensor | None = None
    observed: int | None = None
    sinks: Tensor | None = None

    def joint(self) -> AttentionView:
        """Return a view with all heads as one of full width."""
        # [B, H, N, D] -> [B, 1, N, H D]
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (self.query, self.key))
        scale = query.shape[-1] ** -0.5
        return replace(self, query=query, key=key, scale=scale, bias=None, sinks=None)

    @property
    def keys(self) -> Tensor:
        """Return the keys that are observed."""
        return self.key if self.observed is None else self.key[:, :, -self.observed :]

    def rows(self, positions: Tensor) -> Tensor:
        """Return attention [B, H, R, N] of the queries at positions [B, R], in float32."""
        batch, heads, _, dim = self.query.shape
        groups, length = self.key.shape[1:3]
        rows = positions.shape[1]
        index = positions[:, None, :, None].expand(-1, heads, -1, dim)
        # Query heads that share a key head stand side by side: [B, H_kv, (H / H_kv) R, D].
        chosen = torch.gather(self.query, 2, index).reshape(batch, groups, -1, dim)
        # Keys times queries, not the other way round: ONNX Runtime fuses the block's attention only
        # if nothing else reads the transposed keys.
        logits = (self.key @ chosen.transpose(2, 3)).transpose(2, 3).float() * self.scale
        logits = logits.reshape(batch, heads, rows, length)
        if self.bias is not None:
            across = positions[:, None, :, None].expand(-1, heads, -1, length)
            logits = logits + torch.gather(self.bias, 2, across).float()
        logits = self._masked(logits, positions)
        if self.sinks is None:
            attention = logits.softmax(dim=-1)
        else:
            sinks = self.sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, rows, 1)
            attention = torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        return attention if self.observed is None else attention[..., -self.observed :]

    def gravity(self, positions: Tensor) -> Tensor:
        """Return logits [B, 1, R, N] of all-ones queries and keys, rotated and scaled by D^-1/2.

        The product of rotated ones at two positions p and r is
        sum_i cos(p f_i) cos(r f_i) + sin(p f_i) sin(r f_i), however dimensions are paired.

        Raises:
            ValueError: If the block is not given rotary tables of shape [B, N, D].
        """
        if not isinstance(self.tables, (tuple, list)) or self.tables[0].ndim != 3:
            raise ValueError(
                "Attention can be corrected for rotary positions only in blocks that are given "
                "position_embeddings (cos, sin) of shape [B, N, D]. Use a score without gravity."
            )
        dim = self.query.shape[-1]
        # Dimensions without a rotation add 1 each.
        pull: Any = float(dim - self.tables[0].shape[-1])
        for table in self.tables:
            table = table.to(positions.device).float().expand(positions.shape[0], -1, -1)
            index = positions[..., None].expand(-1, -1, table.shape[-1])
            pull = pull + torch.gather(table, 1, index) @ table.transpose(1, 2)
        return pull[:, None] * dim**-0.5

    def _masked(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Mask logits [B, H, R, N] of the queries at positions [B, R] as the block would."""
        lowest = torch.finfo(torch.float32).min
        mask = self.mask
        if isinstance(mask, BlockMask):
            # Case: flex_attention, whose mask is a function of positions.
            batch, length = len(logits), logits.shape[-1]
            rows = torch.arange(batch, device=logits.device)[:, None, None, None]
            keys = torch.arange(length, device=logits.device)
            visible = mask.mask_mod(rows, torch.zeros_like(rows), positions[:, None, :, None], keys)
            return logits.masked_fill(~visible, lowest)
        if mask is not None and mask.ndim == 4:
            # Case: a mask of queries and keys. It includes causality.
            mask = mask.expand(positions.shape[0], -1, -1, -1)
            index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, logits.shape[-1])
            mask = torch.gather(mask, 2, index)
            if mask.dtype == torch.bool:
                return logits.masked_fill(~mask, lowest)
            return logits + mask.float()
        # Case: no mask of queries and keys. There may be flags of real keys.
        if self.causal:
            later = torch.arange(logits.shape[-1], device=logits.device) > positions[..., None]
            logits = logits.masked_fill(later[:, None], lowest)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None, :] == 0, lowest)
        return logits


def observe(view: AttentionView, observation: Observation, asked: Iterator[Asked]) -> Tensor:
    """Make one observation.

    Args:
        view: The arguments of the attention function.
        observation: What to observe.
        asked: The queries of the observations of attention that are left; the next is taken if this
            is one of them.

    Returns:
        [B, N, D], [B, N, H_kv D] or [B, N], by its kind.
    """
    if observation.kind == "keys":
        return view.keys.mean(dim=1)
    if observation.kind == "joint_keys":
        return view.keys.transpose(1, 2).flatten(2)
    return received_attention(view, observation, next(asked))


def received_attention(view: AttentionView, observation: Observation, asked: Asked) -> Tensor:
    """Return the attention that every key receives: the mean over queries, weighted by votes.

    Args:
        view: The arguments of the attention function.
        observation: How to read them.
        asked: The queries, their votes, and the keys that choose heads.

    Returns:
        [B, N] in float32.
    """
    # What was asked is on the device of the inputs, and the layer may be on another one.
    positions, votes, among = (
        None if value is None else value.to(view.query.device) for value in asked
    )
    view = view.joint() if observation.heads == "joint" else view
    batch, _, length, _ = view.query.shape
    if positions is None:
        # Case: all tokens ask.
        positions = torch.arange(length, device=view.query.device).expand(batch, -1)
    if isinstance(positions.shape[1], int) and not positions.shape[1]:
        # Case: a prompt of images only has no text, so the result is as if no text voted.
        return torch.zeros(batch, length, device=view.query.device)
    received: Any = 0.0
    # The sum over queries, [B, H, N], or [B, 1, N] once heads are joined.
    for part, weight in _few(positions, votes):
        rows = view.rows(part)
        if observation.gravity:
            rows = rows / view.gravity(part)
        if observation.heads == "max":
            rows = rows.amax(dim=1, keepdim=True)
        elif not observation.strongest:
            # With `strongest`, heads stay apart: which of them count is known after all queries.
            rows = rows.mean(dim=1, keepdim=True)
        if weight is not None:
            rows = rows * weight[:, None, :, None]
        received = received + rows.sum(dim=2)
    if observation.strongest:
        assert among is not None
        received = _strongest_heads(received, among, observation.strongest)
    received = received.mean(dim=1)
    if votes is None:
        return received / positions.shape[1]
    return received / votes.float().sum(dim=1, keepdim=True).clamp_min(_NO_VOTES)


def _few(positions: Tensor, votes: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield a few queries at a time, with their votes.

    In an export their number may be dynamic; a graph has no loop, so they come all at once.
    """
    count = positions.shape[1]
    known = isinstance(count, int)
    for start in range(0, count, _QUERIES_AT_ONCE) if known else [0]:
        part = slice(start, start + _QUERIES_AT_ONCE) if known else slice(None)
        yield positions[:, part], None if votes is None else votes[:, part].float()


def _strongest_heads(received: Tensor, among: Tensor, count: int) -> Tensor:
    """Take, in each row of [B, H, N], the `count` heads that give most to keys `among` [B, V]."""
    heads, length = received.shape[1:]
    index = among[:, None].expand(-1, heads, -1)
    share = torch.gather(received, 2, index).sum(dim=2)
    chosen = share.topk(min(count, heads), dim=1).indices
    return torch.gather(received, 1, chosen[..., None].expand(-1, -1, length))
