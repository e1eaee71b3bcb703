"""The static form of a reduction: exactly the operators that a policy needs, in order.

One composition serves two uses. Called plainly it computes; called with a function that records
``(operator, arguments)`` it writes the same operators into a graph. Parts that a reduction does not
use leave no operator: pruning has no assignment, and a single score that is only ranked is not
standardized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from deos_fx.forms.assignment import assignment_of
from deos_fx.forms.choice import Choice, Execute, Value, execute, short
from deos_fx.operator import gather, transfer
from deos_fx.policy.reduction import Reduction

__all__ = ["StaticOutput", "static_reduce"]


class StaticOutput(NamedTuple):
    """Result of ``static_reduce``; the fields are tensors, or graph nodes if the call recorded.

    Attributes:
        tokens: [B, K, d].
        kept: Indices [B, K] into the incoming tokens, in the order of the output; -1 for the copy
            of the CLS token.
        mass: [B, K]; None while every mass is 1.
        assignment: P [B or 1, R, S], including the part of the residual token; None for pruning.
        receivers: Indices [B, R] of the tokens that take in others.
        sources: Indices [B, S] of the tokens that are taken in; None if they can be any tokens.
        score: [B or 1, V] of the first tier, standardized where its values matter; None if scores
            are not used.
        weight: u of the transfer [B or 1, V]; None if it is 1.
    """

    tokens: Any
    kept: Any
    mass: Any
    assignment: Any
    receivers: Any
    sources: Any
    score: Any
    weight: Any


def static_reduce(
    reduction: Reduction,
    count: int,
    tokens: Value,
    mass: Value | None,
    features: Mapping[str, Any],
    call: Execute = execute,
    last_of: int = 0,
) -> StaticOutput:
    """Apply a reduction to the visual tokens.

    Args:
        reduction: The reduction.
        count: K, the number of tokens that come out per row.
        tokens: Hidden states [B, V, d].
        mass: [B, V], or None if every mass is 1.
        features: The features that ``required_features(reduction)`` names, except the tokens. Each
            is looked up only when needed, so the mapping may compute it on demand.
        call: Runs or records an operator. One that records may run operators whose arguments are
            all plain tensors: anchors and grid similarities then become constants.
        last_of: I, if rows are the images of prompts, I each, that end in their I-th image: the
            last token of that image stays, as the last choice, and comes last. 0 if the scores
            alone decide.

    Raises:
        ValueError: If a selector cannot keep that many tokens, or needs complete images where
            tokens were dropped before.
    """
    # 1. The choice, and the assignment of the other tokens.
    call = short(call)
    reduction = reduction.among(count - reduction.keep_class)
    choice = Choice(reduction, count, tokens, features, call, last_of)
    kept = choice.kept()
    moved = assignment_of(choice, kept)
    weight = None
    # 2. The kept tokens, with what moves to them.
    if moved.assignment is None:
        # Case: pruning.
        reduced = call(gather.take, tokens, kept)
        mass = None if mass is None else call(gather.take, mass, kept)
    else:
        parts = (kept, moved.sources, moved.assignment)
        weight = choice.weight()
        own = None
        # The residual token is weighted as those that it takes in.
        if weight is not None and moved.slot is not None:
            own = call(transfer.own_part, moved.slot, moved.receivers, weight)
        # Raw scores replace the masses as weights.
        masses = None if reduction.weighting == "raw" else mass
        how = (own, masses, weight, moved.gain, reduction.exponent, reduction.average)
        reduced = call(transfer.merge, tokens, *parts, *how)
        mass = call(transfer.merged_mass, *parts, mass, moved.gain)
    # 3. Reweighting.
    if reduction.reweight:
        reduced = call(transfer.reweight, reduced, choice.score, kept, reduction.reweight)
    # 4. The order, one row of indices for each row of tokens, and the copy of the CLS token.
    if choice.sorted_last:
        # The receivers are the last tier, so the tokens are in the order of the tiers until here.
        order = call(torch.argsort, kept)
        reduced, kept = (call(gather.take, value, order) for value in (reduced, kept))
        mass = None if mass is None else call(gather.take, mass, order)
    if choice.is_constant(kept):
        kept = call(gather.for_each_row, kept, tokens)
        mass = None if mass is None else call(gather.for_each_row, mass, tokens)
    if reduction.keep_class:
        reduced = call(transfer.with_class, reduced, choice.feature("class_token"))
        kept = call(torch.nn.functional.pad, kept, (1, 0), "constant", -1)
        mass = None if mass is None else call(torch.nn.functional.pad, mass, (1, 0), "constant", 1)
    return StaticOutput(
        tokens=reduced,
        kept=kept,
        mass=mass,
        assignment=moved.assignment,
        receivers=moved.receivers,
        sources=moved.sources,
        score=choice.score,
        weight=weight,
    )
