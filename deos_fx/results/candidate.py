"""A policy that a search has scored."""

from __future__ import annotations

from dataclasses import dataclass

from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """A policy that meets every limit, scored in its static form.

    Attributes:
        policy: The policy.
        source: Its origin: ``step <n>``, ``preset <name>`` or ``refined ...``.
        loss: Task loss of its static graph on the scoring batches.
        cost: Its exact cost.
    """

    policy: Policy
    source: str
    loss: float
    cost: Cost
