"""Say on what the result of a search rests, and what it is too little for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deos_fx.words import counted

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """The data behind the result of a search, and its lead over the best preset that was tried.

    Attributes:
        model: The model, in words.
        trained: Prompts that the steps saw.
        scored: Prompts that policies were scored on.
        held_back: Whether these are others than those of the steps.
        answers: Whether the loss is that of given answers, and not of the unreduced model's.
        preset: Source of the best preset among the candidates; empty if none met the limits.
        preset_loss: Its loss.
        lead: By how much the loss of the policy is lower, mean over the scoring batches.
        error: Standard error of that mean; infinite with a single batch.
    """

    model: str
    trained: int
    scored: int
    held_back: bool
    answers: bool
    preset: str = ""
    preset_loss: float = math.nan
    lead: float = 0.0
    error: float = math.inf

    def __str__(self) -> str:
        others = "others that were held back" if self.held_back else "the same"
        of = "given answers" if self.answers else "the unreduced model's answers"
        return (
            f"Searched for {self.model}, on {counted(self.trained, 'prompt')}; policies were "
            f"scored by the loss of {of} on {counted(self.scored, 'prompt')}, {others}."
        )

    @property
    def doubts(self) -> list[str]:
        """Return what the data is too little for, in words."""
        found = []
        if not self.held_back:
            found.append(
                "No prompts are held back, since there are fewer than four batches: the losses are "
                "those of the prompts that were trained on. Give more data, or smaller batches."
            )
        if self.preset and not self.lead > 2 * self.error:
            lead = "are on one batch alone"
            if self.error < math.inf:
                lead = f"differ by {self.lead:.2g} with a standard error of {self.error:.2g}"
            found.append(
                f"The data cannot tell the policy from {self.preset}, which is simpler: the losses "
                f"{lead}. Search with more data, or compare both on other questions "
                "(deos-fx compare)."
            )
        return found
