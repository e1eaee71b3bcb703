"""Where a dropped token goes: similarities between tokens, and the assignment P made from them.

P [B, K, V] says how much of token j goes to kept token i. Columns of kept tokens are 0 (they stay
where they are); every other column sums to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.scores import full_precision
from deos_fx.operator.select import take

__all__ = [
    "SIMILARITIES",
    "dropped",
    "nearest",
    "similarity",
    "soft",
    "uniform",
]

SIMILARITIES: Mapping[str, str] = {"feature": "tokens", "key": "keys", "grid": "grid"}
"""Kinds of similarity and the feature each is computed from."""


def similarity(
    tokens: Tensor | None,
    keys: Tensor | None,
    grid: Tensor | None,
    weights: Mapping[str, float] | Mapping[str, Tensor],
    kept: Tensor | None = None,
) -> Tensor:
    """Mixes similarities of feature, key and grid position, each in [-1, 1].

    a_ij = w_feature cos(x_i, x_j) + w_key cos(k_i, k_j) + w_grid / (1 + |p_i - p_j|); the grid
    part is -1 between tokens of different images.

    Args:
        tokens: Hidden states [B, V, d], or None if the feature weight is not given.
        keys: Attention keys [B, V, Dk], or None if the key weight is not given.
        grid: Image, row and column, [V, 3] or [B, V, 3], or None if its weight is not given.
        weights: Weight by kind; the kinds given are those computed.
        kept: Rows to compute, [B or 1, K]; all rows if None.

    Returns:
        [B, K, V], or [B, V, V] without ``kept``; B is 1 if nothing depends on the input.
    """
    parts = []
    if "feature" in weights and tokens is not None:
        parts.append(weights["feature"] * _cosine(tokens, kept))
    if "key" in weights and keys is not None:
        parts.append(weights["key"] * _cosine(keys, kept))
    if "grid" in weights and grid is not None:
        parts.append(weights["grid"] * _proximity(grid, kept))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _cosine(x: Tensor, kept: Tensor | None) -> Tensor:
    unit = F.normalize(full_precision(x), dim=-1)
    return (unit if kept is None else take(unit, kept)) @ unit.mT


def _proximity(grid: Tensor, kept: Tensor | None) -> Tensor:
    every = (grid if grid.dim() == 3 else grid.unsqueeze(0)).float()
    some = every
    if kept is not None and grid.dim() == 3:
        some = take(every, kept)
    elif kept is not None:
        some = every[0].index_select(0, kept.flatten()).unflatten(0, (kept.shape[0], -1))
    apart = some.unsqueeze(2) - every.unsqueeze(1)
    distance = apart[..., 1:].square().sum(-1).sqrt()
    return torch.where(apart[..., 0] == 0, 1 / (1 + distance), -1.0)


def dropped(kept: Tensor, tokens: int) -> Tensor:
    """1 for tokens that are not kept and 0 for those that are: [B, V] from indices [B, K]."""
    index = torch.arange(tokens, device=kept.device)
    # A sum of floats: the CUDA provider of ONNX Runtime reduces booleans on the CPU
    # (microsoft/onnxruntime#33876).
    return 1 - (kept.unsqueeze(-1) == index).float().sum(dim=1)


def nearest(similarity: Tensor, kept: Tensor) -> Tensor:
    """Assigns each dropped token to the most similar kept one, the first of them on a tie.

    Args:
        similarity: [B, K, V], rows of the kept tokens.
        kept: Indices [B, K].

    Returns:
        One-hot P [B, K, V].
    """
    slot = torch.arange(similarity.shape[1], device=similarity.device).unsqueeze(-1)
    chosen = (slot == similarity.argmax(dim=1, keepdim=True)).to(similarity.dtype)
    return chosen * dropped(kept, similarity.shape[-1]).unsqueeze(1)


def soft(similarity: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """Spreads each dropped token over the kept ones: P = softmax_i(a_ij / tau).

    Args:
        similarity: [B, K, V], rows of the kept tokens.
        kept: Indices [B, K].
        temperature: tau > 0.
    """
    share = (similarity / temperature).softmax(dim=1)
    return share * dropped(kept, similarity.shape[-1]).unsqueeze(1)


def uniform(kept: Tensor, tokens: Tensor) -> Tensor:
    """Spreads each dropped token of [B, V, d] evenly: the limit tau = infinity, P = 1 / K."""
    gone = dropped(kept, tokens.shape[1]).unsqueeze(1)
    return (gone / kept.shape[1]).expand(-1, kept.shape[1], -1)
