"""Indices of a choice of tokens: gather the tokens, flag them, list the others."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chosen", "for_each_row", "in_order", "others", "same_rows", "take", "with_last"]


def take(values: Tensor, kept: Tensor) -> Tensor:
    """Gather the kept entries of every row.

    Vectors are gathered by one index over the flattened rows, because a gather along an expanded
    index would read eight bytes of index per element.

    Args:
        values: [B, V] or [B, V, d]; a single row serves all rows of indices.
        kept: Indices [B, K], or [1, K] if every row keeps the same tokens.

    Returns:
        [B, K] or [B, K, d].
    """
    if values.shape[0] == 1 and kept.shape[0] != 1:
        values = values.expand(kept.shape[0], *values.shape[1:])
    rows, tokens = values.shape[:2]
    if values.dim() == 2:
        return values.gather(1, kept.expand(rows, -1))
    # A single row needs no offset; in an export with a dynamic batch, `rows` is not an int.
    if not isinstance(rows, int) or rows > 1:
        kept = kept + torch.arange(rows, device=kept.device).unsqueeze(-1) * tokens
    return values.flatten(0, 1).index_select(0, kept.flatten()).unflatten(0, (rows, -1))


def same_rows(*values: Tensor) -> list[Tensor]:
    """Expand values [B or 1, ...] to B rows each."""
    rows = next((value.shape[0] for value in values if value.shape[0] != 1), 1)
    return [value.expand(rows, *value.shape[1:]) for value in values]


def for_each_row(kept: Tensor, tokens: Tensor) -> Tensor:
    """Repeat a constant choice [1, K] for every row of the tokens [B, V, d]: [B, K]."""
    return kept.expand(tokens.shape[0], -1)


def in_order(kept: Tensor) -> Tensor:
    """Sort indices [B, K] in ascending order."""
    return kept.sort(dim=-1).values


def chosen(kept: Tensor, tokens: Tensor) -> Tensor:
    """Return flags [B, V] that are 1 for the kept tokens of [B, V, d], 0 for the others."""
    flags = torch.zeros((kept.shape[0], tokens.shape[1]), device=kept.device)
    return flags.scatter(1, kept, 1.0)


def others(kept: Tensor, tokens: Tensor) -> Tensor:
    """Return ascending indices [B, V - K] of the tokens of [B, V, d] that are not kept."""
    # The largest priorities among the tokens that are not kept, so the result is ascending.
    left = tokens.shape[1] - kept.shape[1]
    falling = _falling(tokens.shape[1], kept).expand(kept.shape[0], -1)
    return falling.scatter(1, kept, 0.0).topk(left, dim=1).indices


def with_last(kept: Tensor, tokens: Tensor, images: int, after: int = 0) -> Tensor:
    """Return the same choice, made to include the last token of the last image.

    That token counts as the last pick; if it was not picked, the last pick makes way for it.

    Args:
        kept: Indices [R, K] in the order of the picks.
        tokens: [R, V, d]; only its shape is read.
        images: Rows of one prompt, which are its images.
        after: Number of picks that stay after it (the residual token), fewer than K.

    Returns:
        [R, K].
    """
    place = torch.arange(kept.shape[1], device=kept.device)
    last = tokens.shape[1] - 1
    # The place where the token was picked (at most once), or else the last place: that pick makes
    # way.
    leaves = torch.where(kept == last, place, kept.shape[1] * 2).amin(dim=1, keepdim=True)
    leaves = leaves.clamp(max=kept.shape[1] - 1)
    # All other picks, moved up by one from there on; the last entry is not used.
    others = kept.gather(1, (place + (place >= leaves)).clamp(max=kept.shape[1] - 1))
    # The last token is put in front of the picks that stay after it.
    here = kept.shape[1] - 1 - after
    moved = torch.cat(
        [others[:, :here], torch.full_like(others[:, :1], last), others[:, here:-1]], dim=1
    )
    if images == 1:
        return moved
    # Only the row of each prompt's last image changes.
    row = torch.arange(kept.shape[0], device=kept.device).unsqueeze(-1)
    return torch.where(row % images == images - 1, moved, kept)


def listed(flags: Tensor, count: int) -> Tensor:
    """Return the first ``count`` positions of set flags [B, V], ascending: [B, count].

    One TopK over strictly decreasing priorities: no sort, no NonZero, no tie to break.
    """
    return (flags * _falling(flags.shape[1], flags)).topk(count, dim=1).indices


def _falling(length: int, like: Tensor) -> Tensor:
    """Return priorities [V] that fall along the list and are all above 0."""
    return torch.arange(length, 0, -1, device=like.device, dtype=torch.float32)
