"""The assignment of dropped tokens to kept ones, in the static form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deos_fx.forms.choice import Choice, Value, number_of
from deos_fx.operator import assign, gather, grid, select, transfer

__all__ = ["assignment_of"]


@dataclass
class _Assignment:
    """What moves where: three fields of ``StaticOutput``, the residual slot and the gain.

    Attributes:
        assignment: P; None if nothing moves.
        receivers: Indices of the tokens that take in others.
        sources: Indices of the tokens that move; None for all.
        slot: Flags of the residual token among the receivers; None without one.
        gain: The gain that is not yet part of P.
    """

    assignment: Value | None = None
    receivers: Value | None = None
    sources: Value | None = None
    slot: Value | None = None
    gain: float = 1.0


def assignment_of(choice: Choice, kept: Value) -> _Assignment:
    """Assign the tokens that were not chosen.

    1. Pruning assigns nothing.
    2. Windows: bilinear interpolation, in which all tokens are sources.
    3. k nearest: receivers choose among all tokens.
    4. Otherwise, every dropped token is shared among the receivers.

    Args:
        choice: The choice of the tokens that stay.
        kept: Their indices [B, K].
    """
    reduction, call = choice.reduction, choice.call
    if not reduction.transfers:
        return _Assignment()
    moved = _Assignment(receivers=_receivers(choice, kept), gain=reduction.gain)
    if reduction.assignment == "window":
        # Case 2.
        moved.assignment = call(grid.interpolation, choice.feature("grid"), choice.count)
        if choice.last_of:
            # The last token of a prompt may have taken the place of an anchor.
            moved.assignment = call(assign.standing_in, moved.assignment, choice.anchors, kept)
    elif reduction.assignment == "k_nearest":
        # Case 3.
        likeness = _likeness(choice, moved.receivers, None)
        nearest = (likeness, moved.receivers, reduction.neighbours)
        moved.assignment = call(assign.k_nearest, *nearest)
    else:
        # Case 4.
        moved.sources = call(gather.others, kept, choice.token_axis(kept))
        # With gain 0, only a residual token takes in others.
        if reduction.gain:
            moved.assignment = _shares(choice, moved)
    if choice.rest is not None:
        _add_rest(choice, kept, moved)
    return moved


def _shares(choice: Choice, moved: _Assignment) -> Value:
    """Share every source among the receivers, by the temperature."""
    reduction, call = choice.reduction, choice.call
    if reduction.temperature == math.inf:
        return call(assign.uniform, moved.receivers, moved.sources)
    # Only now: a uniform assignment compares nothing.
    likeness = _likeness(choice, moved.receivers, moved.sources)
    if reduction.temperature == 0:
        return call(assign.nearest, likeness)
    return call(assign.soft, likeness, reduction.temperature)


def _likeness(choice: Choice, receivers: Value | None, sources: Value | None) -> Value:
    """Compare receivers with sources, or with all tokens if these are None."""
    weights = dict(choice.reduction.similarity)
    return choice.call(assign.similarity, choice.compared(), weights, receivers, sources)


def _receivers(choice: Choice, kept: Value) -> Value:
    """Return the kept tokens that may take in others: all, or those of the last tier."""
    reduction, call = choice.reduction, choice.call
    if reduction.receivers == "all":
        return kept
    last = reduction.selection[-1]
    if last.selector == "bipartite":
        # Case: half A is merged into half B only.
        return call(select.second_half, kept, choice.tokens, number_of(last.options["first"]))
    # Case: the last tier, with the residual token after it.
    size = reduction.tier_counts(choice.count)[-1] + reduction.has_rest
    return call(torch.narrow, kept, 1, choice.count - size, size)


def _add_rest(choice: Choice, kept: Value, moved: _Assignment) -> None:
    """Let the residual token take in content that is dropped and not transferred."""
    reduction, call = choice.reduction, choice.call
    moved.slot = call(transfer.slot_of, moved.receivers, choice.rest)
    if moved.sources is None:
        # Case: receivers chose among all tokens, so the dropped ones are found from `kept`.
        parts = (moved.assignment, moved.slot, kept, reduction.gain)
        moved.assignment = call(transfer.rest_beside, *parts)
    else:
        parts = (moved.assignment, moved.slot, moved.sources, reduction.gain)
        moved.assignment = call(transfer.rest, *parts)
    # The gain is part of the assignment now.
    moved.gain = 1.0
