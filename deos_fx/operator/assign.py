"""Similarities between tokens, and the assignment P that says where dropped tokens go.

P [B, R, S] says how much of source token j goes to receiver i. In most assignments the sources are
the dropped tokens, and every column sums to 1. In those in which receivers choose (``k_nearest``,
interpolation), all tokens are sources, and columns need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.gather import take
from deos_fx.operator.scores import full_precision

__all__ = [
    "SIMILARITIES",
    "between_halves",
    "centred",
    "k_nearest",
    "nearest",
    "similarity",
    "soft",
    "standing_in",
    "uniform",
]

SIMILARITIES: Mapping[str, str] = {
    "feature": "tokens",
    "key": "keys",
    "joint_key": "joint_keys",
    "grid": "grid",
    "centred": "tokens",
    "learned": "tokens",
}
"""Kind of similarity -> the feature that it is computed from.

The last two compare features of the tokens that are computed first: see ``centred`` and
``learned.projected``.
"""

_Which = Tensor | slice | None
"""A choice of tokens: indices [B or 1, R], a slice, or None for all."""


def similarity(
    features: Mapping[str, Tensor],
    weights: Mapping[str, float] | Mapping[str, Tensor],
    rows: _Which = None,
    columns: _Which = None,
) -> Tensor:
    """Mix similarities of feature, key and grid position, each in [-1, 1].

    a_ij = sum_f w_f cos(f_i, f_j) + w_grid / (1 + |p_i - p_j|), where f is the hidden state, the
    mean of the keys over heads, the keys of all heads together, the hidden state without the mean
    over the tokens, or along learned directions; the grid part is -1 between tokens of different
    images.

    Args:
        features: Values by name of the kind: [B, V, d], and for ``grid`` image, row and column,
            [V, 3] or [B, V, 3].
        weights: Weight by kind; only these kinds are computed.
        rows: Tokens i, indices [B or 1, R] or a slice; all tokens if None.
        columns: Tokens j, indices [B or 1, C] or a slice; all tokens if None.

    Returns:
        [B, R, C]; B is 1 if nothing depends on the input.
    """
    total: Tensor | None = None
    for kind, weight in weights.items():
        compare = _proximity if kind == "grid" else _cosine
        part = compare(features[kind], rows, columns)
        # A weight of 1 (a single kind) needs no multiplication over all pairs.
        part = part if isinstance(weight, float) and weight == 1 else weight * part
        total = part if total is None else total + part
    assert total is not None, "no similarity to compute"
    return total


def centred(tokens: Tensor, alive: Tensor | None = None) -> Tensor:
    """Return tokens [B, V, d] without their mean, which all of them share (Cen-Prune).

    Args:
        tokens: [B, V, d].
        alive: Gates [B, V] by which the mean is weighted; ones if None.
    """
    values = full_precision(tokens)
    if alive is None:
        return values - values.mean(dim=1, keepdim=True)
    share = alive / alive.sum(dim=-1, keepdim=True)
    return values - share.to(values).unsqueeze(1) @ values


def between_halves(
    features: Mapping[str, Tensor], weights: Mapping[str, float], first: int
) -> Tensor:
    """Return similarities of alternating tokens: A = first, first + 2, ... and B the others.

    Args:
        features: As for ``similarity``.
        weights: As for ``similarity``.
        first: 0 or 1.

    Returns:
        [B, |A|, |B|].
    """
    return similarity(features, weights, slice(first, None, 2), slice(1 - first, None, 2))


def _cosine(x: Tensor, rows: _Which, columns: _Which) -> Tensor:
    """Return cos(x_i, x_j) of some tokens of [B, V, d]."""
    unit = F.normalize(full_precision(x), dim=-1)
    return _some(unit, rows) @ _some(unit, columns).mT


def _proximity(grid: Tensor, rows: _Which, columns: _Which) -> Tensor:
    """Return 1 / (1 + |p_i - p_j|) of some places of [V, 3] or [B, V, 3]; -1 between images."""
    every = (grid if grid.dim() == 3 else grid.unsqueeze(0)).float()
    apart = _some(every, rows).unsqueeze(2) - _some(every, columns).unsqueeze(1)
    distance = apart[..., 1:].square().sum(-1).sqrt()
    return torch.where(apart[..., 0] == 0, 1 / (1 + distance), -1.0)


def _some(x: Tensor, index: _Which) -> Tensor:
    """Take rows of [B or 1, V, d] at indices [B or 1, R] or in a slice."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x[:, index]
    if index.shape[0] == 1:
        # Case: a constant choice. It is shared by all rows without being repeated.
        return x.index_select(1, index.flatten())
    return take(x.expand(index.shape[0], -1, -1), index)


def nearest(similarity: Tensor) -> Tensor:
    """Assign each source to the most similar receiver, to the first of them on a tie.

    Args:
        similarity: [B, R, S].

    Returns:
        One-hot P [B, R, S].
    """
    slot = torch.arange(similarity.shape[1], device=similarity.device).unsqueeze(-1)
    return (slot == similarity.argmax(dim=1, keepdim=True)).to(similarity.dtype)


def soft(similarity: Tensor, temperature: float) -> Tensor:
    """Spread each source over the receivers: P = softmax_i(a_ij / tau).

    Args:
        similarity: [B, R, S].
        temperature: tau > 0.
    """
    return (similarity / temperature).softmax(dim=1)


def uniform(receivers: Tensor, sources: Tensor) -> Tensor:
    """Spread each source [B, S] evenly over [B, R]: the limit tau = infinity, P = 1 / R."""
    share = torch.ones(sources.shape, device=sources.device).unsqueeze(1) / receivers.shape[1]
    return share.expand(-1, receivers.shape[1], -1)


def standing_in(assignment: Tensor, anchors: Tensor, kept: Tensor) -> Tensor:
    """Adapt an assignment made for anchors to the tokens that are kept in their place.

    Args:
        assignment: P [1, K, V], 0 between an anchor and itself.
        anchors: Indices [1, K].
        kept: Indices [B or 1, K] of the tokens that are kept in place of the anchors.

    Returns:
        P [B or 1, K, V]: a replaced anchor moves to its replacement the share that the replacement
        would have moved to the anchor.
    """
    places, kept = anchors.expand_as(kept).unsqueeze(-1), kept.unsqueeze(-1)
    assignment = assignment.expand(kept.shape[0], -1, -1)
    # What the replacement would have moved to the anchor; 0 where kept == anchor, so that nothing
    # changes.
    moved = assignment.gather(2, kept)
    # The anchor gives that share now, and the replacement gives nothing to itself.
    return assignment.scatter(2, places, moved).scatter(2, kept, 0.0)


def k_nearest(similarity: Tensor, receivers: Tensor, neighbours: int) -> Tensor:
    """Give each receiver its most similar other tokens, kept or dropped (PruMerge).

    Args:
        similarity: [B, R, V] to all tokens.
        receivers: Indices [B, R].
        neighbours: How many tokens each receiver gets, at most V - 1.

    Returns:
        P [B, R, V] of zeros and ones, with that many ones in every row.
    """
    index = receivers.unsqueeze(-1).expand(similarity.shape[0], -1, -1)
    # A receiver is not its own neighbour.
    apart = similarity.scatter(2, index, torch.finfo(similarity.dtype).min)
    best = apart.topk(min(neighbours, similarity.shape[2] - 1), dim=-1).indices
    return torch.zeros_like(similarity).scatter(2, best, 1.0)
