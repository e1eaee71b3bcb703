"""The result of a search."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from deos_fx.cost.amounts import Cost
from deos_fx.policy.policy import Policy
from deos_fx.results.candidate import Candidate
from deos_fx.results.search_page import search_report

__all__ = ["SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        policy: The candidate with the lowest static loss; it meets every limit.
        history: One dict for each step: task loss, relaxed costs, multipliers, gate temperature.
        candidates: Every policy that was scored in static form, best first.
        limits: Absolute limits by name.
        unreduced: Cost of the model without reductions.
        unreduced_loss: Task loss of that model on the scoring batches (0 for self-distillation).
        relaxed_loss: Task loss of the returned policy in its relaxed form, at the last gate
            temperature.
        interrupted: Whether the steps were cut short (Ctrl-C).
    """

    policy: Policy
    history: list[dict[str, Any]] = field(repr=False)
    candidates: list[Candidate] = field(repr=False)
    limits: dict[str, float]
    unreduced: Cost
    unreduced_loss: float
    relaxed_loss: float
    interrupted: bool = False

    @property
    def best(self) -> Candidate:
        """Return the candidate whose policy is the result."""
        return self.candidates[0]

    @property
    def gap(self) -> float:
        """Return the static minus the relaxed task loss of the returned policy."""
        return self.best.loss - self.relaxed_loss

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page about the search.

        Args:
            path: The file to write.

        Raises:
            OSError: If the file cannot be written.
        """
        search_report(self, path)
