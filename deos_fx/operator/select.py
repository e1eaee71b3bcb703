"""Selectors, which decide which tokens stay: a function for each, and a table of all of them.

A selector returns K indices per row, in the order in which it picked them. It is told which tokens
earlier tiers have chosen (``taken``), and does not pick them again. A new selector is a function
here, or in a file of its own, and a row of ``SELECTORS``; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deos_fx.operator import grid, sequential
from deos_fx.operator.gather import chosen, listed
from deos_fx.operator.scores import full_precision

__all__ = [
    "SELECTORS",
    "Selector",
    "bipartite",
    "favour",
    "lattice",
    "neighbourhood",
    "quota",
    "second_half",
    "strided",
    "top_k",
    "windows",
]


def top_k(score: Tensor, taken: Tensor | None, count: int) -> Tensor:
    """Return indices [B, K] of the ``count`` largest scores of [B, V], the largest first.

    Of tokens with equal scores, the earlier ones are taken. Scores are often equal where tokens are
    entries of a codebook, and where attention does not reach beyond a window.

    Args:
        score: [B, V].
        taken: Flags [B, V] of tokens that must not be picked again, or None.
        count: K.
    """
    free = _free(full_precision(score), taken)
    if torch.compiler.is_exporting():
        # ONNX guarantees this order for TopK, and has no stable sort.
        return free.topk(count, dim=-1).indices
    return free.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def windows(
    score: Tensor, members: Tensor, taken: Tensor | None, count: int, windows: int
) -> Tensor:
    """Pick the best tokens of each window of the image (the local stage of VScan).

    Every window offers its K / W best tokens, rounded up; of these, the K best stay.

    Args:
        score: [B, V].
        members: Tokens of each window, a constant [W, m] (see ``grid.window_members``).
        taken: Flags [B, V] of tokens that must not be picked again, or None.
        count: K.
        windows: Number of windows in one image; not read, since ``members`` has them.

    Returns:
        Indices [B, K], the largest score first; if a window has too few free tokens, the best of
        the others follow.
    """
    score = _free(full_precision(score), taken)
    inside = score.index_select(1, members.flatten()).unflatten(1, members.shape)
    # ceil(K / W), in whole numbers.
    best = inside.topk(-(-count // len(members)), dim=-1).indices
    # Where each window begins in the flattened members.
    place = torch.arange(len(members), device=score.device).unsqueeze(-1) * members.shape[1]
    flags = chosen(members.flatten()[(best + place).flatten(1)], score)
    return top_k(favour(score, flags), taken, count)


def quota(score: Tensor, taken: Tensor | None, count: int, windows: int) -> Tensor:
    """Give each run of the list of tokens places in proportion to its mean score (HoloV).

    1. The list is cut into W runs; if they cannot be equal, the first ones are longer by one token.
    2. With w the share of a run's mean in the sum of the means, a run gets floor(K w) places. The
       runs with the largest w get one more each, until K are given.
    3. A run fills its places with its best tokens. Places for which it has no tokens go to the best
       of the rest (HoloV pads with zero vectors instead).

    Args:
        score: [B, V]; a run with a negative mean gets places only if others leave some.
        taken: Flags [B, V] of tokens that must not be picked again, or None.
        count: K.
        windows: W.

    Returns:
        Indices [B, K], run by run, the largest score of each first.
    """
    score = full_precision(score)
    # Rule 1.
    member, inside = _runs(score, windows)
    width, length = member.shape[1], inside.sum(dim=-1)
    runs = score.index_select(1, member.flatten()).unflatten(1, member.shape)
    # Rule 2.
    places = _places((runs * inside).sum(dim=-1) / length, count).unsqueeze(-1)
    # Rule 3.
    free = inside.expand_as(runs)
    if taken is not None:
        free = free * (1 - taken.index_select(1, member.flatten()).unflatten(1, member.shape))
    wanted = torch.where(free > 0, runs, torch.finfo(score.dtype).min)
    rank = _rank(wanted)
    # The slot of a token in the result, run by run. A run that is kept whole stays in the order of
    # the list.
    place = torch.arange(width, device=score.device)
    slot = torch.where(places >= length.unsqueeze(-1), place, rank)
    slot = slot + torch.arange(windows, device=score.device).unsqueeze(-1) * width
    # Tokens that got no place in their run come last, the best first.
    after_all = -_rank(wanted.flatten(1)) - 1
    chosen_by_run = ((rank < places) & (free > 0)).flatten(1)
    # Priorities fall with the slot, and are above 0 for chosen tokens, below 0 for the others.
    priority = torch.where(chosen_by_run, member.numel() - slot.flatten(1), after_all)
    return member.flatten()[priority.to(score.dtype).topk(count, dim=-1).indices]


def _runs(score: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Return the tokens [W, m] of the runs of a list, and flags that are 0 in padding."""
    size, longer = divmod(score.shape[-1], windows)
    length = size + (torch.arange(windows, device=score.device).unsqueeze(-1) < longer).long()
    place = torch.arange(size + (longer > 0), device=score.device)
    inside = place < length
    # Shorter runs are padded with token 0.
    return (length.cumsum(0) - length + place) * inside, inside.to(score.dtype)


def _places(mean: Tensor, count: int) -> Tensor:
    """Split ``count`` places over the runs [B, W] in proportion to their means."""
    mean = mean.clamp_min(0)
    share = mean / (mean.sum(dim=-1, keepdim=True) + 1e-6)
    places = (share * count).floor()
    # Places lost to rounding down go to the largest shares.
    missing = count - places.sum(dim=-1, keepdim=True)
    return places + (_rank(share) < missing).to(places.dtype)


def strided(tokens: Tensor, taken: Tensor | None, already: int, count: int) -> Tensor:
    """Pick every step-th token of those left, with step = max(1, left // K) (VisionZip's targets).

    Args:
        tokens: [B, V, d]; only its shape is read.
        taken: Flags [B, V] of tokens that are chosen already, or None.
        already: Number of tokens that are chosen already.
        count: K.

    Returns:
        Indices [B, K], ascending.
    """
    left = tokens.shape[1] - already
    step = max(1, left // count)
    if taken is None:
        index = torch.arange(left, device=tokens.device).expand(tokens.shape[0], -1)
    else:
        index = listed(1 - taken, left)
    return index[:, ::step][:, :count]


def lattice(tokens: Tensor, taken: Tensor | None, count: int, step: int) -> Tensor:
    """Pick the tokens at multiples of a step that are not chosen yet (PruMerge+).

    The last token of the list does not count as one of them.

    Args:
        tokens: [B, V, d]; only its shape is read.
        taken: Flags [B, V] of tokens that are chosen already, or None.
        count: K; if the step gives fewer, others follow in the order of the list.
        step: The step.

    Returns:
        Indices [B, K]: first those at multiples of the step, then the others, each ascending.
    """
    length = tokens.shape[1]
    place = torch.arange(length, device=tokens.device)
    wanted = ((place % step == 0) & (place < length - 1)).float().expand(tokens.shape[0], -1)
    # Wanted tokens first, and earlier ones first among equals; all above 0, which is taken.
    priority = wanted * length + (length - place)
    free = priority if taken is None else priority * (1 - taken)
    return free.topk(count, dim=-1).indices


def bipartite(between: Tensor, count: int, first: int) -> Tensor:
    """Drop the tokens of one half that are most similar to some token of the other (ToMe).

    The list is split into two halves A and B of alternating tokens. All of B stays. Of A, the
    tokens stay whose nearest token of B is farthest away; the others are to be merged into B.

    Args:
        between: Similarity of A and B [B, |A|, |B|].
        count: K, at least |B|.
        first: Place of the first token of A, 0 or 1.

    Returns:
        Indices [B, K]: the tokens of A that stay, ascending, and then B.

    Raises:
        ValueError: If more tokens than A has would have to leave.
    """
    rows, size, other = between.shape
    if count < other:
        raise ValueError(
            f"the selector 'bipartite' keeps {count} of {size + other} tokens, but at most one "
            f"half can be merged into the other: keep at least {other}, and reduce at several sites"
        )
    if not other:
        # Case: a single token, which has no other to be merged into.
        return torch.zeros(rows, count, dtype=torch.int64, device=between.device)
    nearest = full_precision(between).amax(dim=-1)
    alone = nearest.topk(count - other, dim=-1, largest=False).indices
    # Token i of A is at place 2 i + first of the list.
    half_a = alone.sort(dim=-1).values * 2 + first
    half_b = torch.arange(1 - first, 2 * other, 2, device=between.device)
    return torch.cat([half_a, half_b.expand(rows, -1)], dim=-1)


def second_half(kept: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Return the tokens of half B, [B, |B|], from the indices ``bipartite`` kept of [B, V, d]."""
    # With first = 0, A has the tokens at even places and gets the odd one out. A single token is
    # its own receiver.
    size = max(1, (tokens.shape[1] + first) // 2)
    return kept[:, kept.shape[1] - size :]


def neighbourhood(score: Tensor, columns: int, count: int, share: float) -> Tensor:
    """Flag [B, V] the best tokens and their four neighbours (HiPrune's anchors and buffers).

    The anchors are the round(K alpha / 5) best tokens by score. They are flagged, and so are the
    tokens one place and one row before and after them in the list, clamped to its ends. Where
    neighbourhoods overlap, fewer tokens are flagged, and the next tier fills the places.

    Args:
        score: [B, V].
        columns: Number of tokens in one row of the image.
        count: K of the whole reduction.
        share: alpha.
    """
    wanted = min(round(count * share / 5), score.shape[-1])
    if wanted < 1:
        # Case: so few places that there is no anchor.
        return torch.zeros_like(full_precision(score))
    anchors = top_k(score, None, wanted)
    # The token itself, and its neighbours to the left and right, above and below.
    steps = torch.tensor([0, -1, 1, -columns, columns], device=score.device)
    near = (anchors.unsqueeze(-1) + steps).clamp(0, score.shape[-1] - 1)
    return chosen(near.flatten(1), score)


def favour(score: Tensor, flags: Tensor) -> Tensor:
    """Return priorities [B, V] in the order of the scores, with flagged tokens above all others."""
    score = full_precision(score)
    # Ranks are below V, so V separates flagged tokens from the others.
    return flags * score.shape[-1] - _rank(score).to(score.dtype)


def _free(score: Tensor, taken: Tensor | None) -> Tensor:
    """Give tokens that are taken the lowest score."""
    if taken is None:
        return score
    return torch.where(taken > 0, torch.finfo(score.dtype).min, score)


def _rank(values: Tensor) -> Tensor:
    """Return the place [..., n] of each value in falling order, 0 for the largest."""
    order = values.topk(values.shape[-1], dim=-1).indices
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, place)


@dataclass(frozen=True)
class Selector:
    """A row of ``SELECTORS``.

    Attributes:
        function: Takes what ``needs`` names, then the count, then the options, in that order.
        needs: ``score``; ``similarity`` [B, V, V]; ``halves``, the similarity [B, |A|, |B|] of
            alternating tokens; ``members`` of the windows and ``columns`` of the grid, constants;
            ``taken``, flags [B, V] or None, and ``already``, their number; ``diversity``; or names
            of features.
        options: Defaults of its parameters by name; None where a value must be given.
        flags: Whether it flags tokens for the next tier to prefer, instead of picking some.
        relaxed: Whether it has a differentiable form, so that a search can use it.
    """

    function: Callable[..., Any]
    needs: tuple[str, ...]
    options: Mapping[str, float | None] = field(default_factory=dict)
    flags: bool = False
    relaxed: bool = False

    @property
    def ranks(self) -> bool:
        """Return whether it ranks by the scores."""
        return "score" in self.needs

    @property
    def compares(self) -> bool:
        """Return whether it compares tokens with each other by the similarity."""
        return not {"similarity", "halves"}.isdisjoint(self.needs)

    @property
    def whole_grid(self) -> bool:
        """Return whether it needs complete images, of which no score has dropped tokens before."""
        return not {"grid", "members", "columns"}.isdisjoint(self.needs)

    @property
    def features(self) -> tuple[str, ...]:
        """Return the features it reads, in addition to those of scores and similarities."""
        made = {"members": "grid", "columns": "grid"}
        return tuple(made.get(name, name) for name in self.needs if name not in _BOOKKEEPING)


WHOLE_NUMBERS: Mapping[str, tuple[float, float]] = {
    "at_once": (1, 1e6),
    "first": (0, 1),
    "image_pivots": (1, 1e6),
    "per_round": (1, 1e6),
    "seed": (-1e9, 1e9),
    "step": (1, 1e6),
    "text_pivots": (0, 1e6),
    "windows": (1, 1e6),
}
"""Options of selectors and scores that are whole numbers: name -> (smallest, largest)."""

# Needs of a selector that are no features: the choice itself computes them.
_BOOKKEEPING = ("score", "similarity", "halves", "taken", "already", "diversity")

SELECTORS: Mapping[str, Selector] = {
    "top_k": Selector(top_k, ("score", "taken"), relaxed=True),
    "greedy": Selector(
        sequential.greedy,
        ("score", "similarity", "taken", "diversity"),
        {"at_once": 1},
        relaxed=True,
    ),
    "max_min": Selector(sequential.max_min, ("similarity", "taken"), {"at_once": 1}, relaxed=True),
    "determinantal": Selector(sequential.determinantal, ("score", "similarity", "taken")),
    "coverage": Selector(sequential.coverage, ("score", "similarity", "taken"), {"power": 1.0}),
    "distinct": Selector(
        sequential.distinct, ("score", "similarity", "taken", "already"), {"per_round": 8}
    ),
    "probe": Selector(
        sequential.probe,
        ("score", "normed_tokens", "text_score", "normed_text", "taken"),
        {"image_pivots": 4, "text_pivots": 4},
    ),
    "grid": Selector(grid.grid_anchors, ("grid",), relaxed=True),
    "strided": Selector(strided, ("tokens", "taken", "already")),
    "lattice": Selector(lattice, ("tokens", "taken"), {"step": None}),
    "windows": Selector(windows, ("score", "members", "taken"), {"windows": None}),
    "quota": Selector(quota, ("score", "taken"), {"windows": None}),
    "bipartite": Selector(bipartite, ("halves",), {"first": 0}),
    "neighbourhood": Selector(neighbourhood, ("score", "columns"), {"share": 0.1}, flags=True),
}
