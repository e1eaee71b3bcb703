"""The objective of a search: a task loss, and a penalty for costs beyond their limits.

The task is the loss on labels, or the distance to the unreduced model along its own answers. Both
are measured at positions of text, which no reduction drops, so relaxed and static graphs of any
token count are scored on the same predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.tokens.index import take

__all__ = ["AugmentedLagrangian", "Effort", "Target", "before_answer", "distilled", "labelled"]


@dataclass(frozen=True)
class Target:
    """The predictions that the logits of one batch are compared with.

    Attributes:
        positions: Bool [B, N]; the original prompt positions whose predictions count (P of them).
        labels: int64 [P] next tokens, or None.
        logits: [P, vocabulary] of the unreduced model, or None.
    """

    positions: Tensor
    labels: Tensor | None = None
    logits: Tensor | None = None

    def loss(self, logits: Tensor, origin: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy on labels, or the mean KL(unreduced || reduced).

        Args:
            logits: [B, M, vocabulary].
            origin: [B, M] original prompt positions of the rows of `logits`; None if M = N.

        Returns:
            0-dim float32; NaN if text was dropped, as where scores are NaN.
        """
        # In a reduced graph, the same predictions are at other places.
        device = logits.device
        # A target waits where the data is.
        positions = self.positions.to(device)
        if origin is not None:
            positions = take(positions, origin.to(device))
        predicted = logits[positions].float()
        wanted = self.labels if self.labels is not None else self.logits
        assert wanted is not None
        if len(predicted) != len(wanted):
            return predicted.new_full((), math.nan)
        if self.labels is not None:
            # Case: labels.
            return F.cross_entropy(predicted, wanted.to(device))
        # Case: the answers of the unreduced model.
        return F.kl_div(
            predicted.log_softmax(-1),
            wanted.to(device).float().log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )


@dataclass
class Effort:
    """How often the model was run on a batch to measure its loss, by all processes together.

    Attributes:
        forwards: Forward passes, reduced or not.
        backwards: Backward passes.
    """

    forwards: int = 0
    backwards: int = 0

    @property
    def evaluations(self) -> int:
        """Return the passes in units of a forward pass: a backward pass counts two."""
        return self.forwards + 2 * self.backwards


def labelled(labels: Tensor, visual: Tensor) -> Target:
    """Make next-token targets at positions with labels.

    Args:
        labels: [B, N], -100 where nothing is asked, as transformers' models take them.
        visual: Bool [B, N]; a prediction made *at* a visual token is left out, because the token
            may be dropped.

    Returns:
        The target.

    Raises:
        ValueError: If no label is left.
    """
    # The label of the next token belongs to the prediction at this one.
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    positions = (following != -100) & ~visual
    if not positions.any():
        raise ValueError(
            "labels are -100 everywhere behind text: mark the answer tokens with their ids, or "
            "leave labels out, so that the unreduced model answers; a prompt has to end in text."
        )
    return Target(positions, labels=following[positions])


def before_answer(labels: Tensor, padding: Tensor | None) -> Tensor:
    """Return flags [B, N] of real tokens before the first label: what a reduction may look at.

    Args:
        labels: [B, N], -100 where nothing is asked.
        padding: [B, N] with 1 for real tokens, or None.
    """
    asked = (labels != -100).long().cumsum(dim=1) == 0
    return asked.long() if padding is None else asked.long() * padding.long()


def distilled(labels: Tensor, visual: Tensor, unreduced: Tensor) -> Target:
    """Make targets of the unreduced model's predictions of its own answers.

    Args:
        labels: [B, N]; its answers, as for `labelled`.
        visual: Bool [B, N].
        unreduced: Logits [B, N, vocabulary] of the unreduced model.

    Returns:
        The target.

    Raises:
        ValueError: If no label is left.
    """
    positions = labelled(labels, visual).positions
    return Target(positions, logits=unreduced[positions])


class AugmentedLagrangian:
    """A penalty for constraints C <= limit; being under a limit neither costs nor earns anything.

    With the violation g = C / limit - 1, the multiplier lambda >= 0 and the stiffness rho,

        penalty = (max(0, lambda + rho g)^2 - lambda^2) / (2 rho)      (Rockafellar 1973)
        lambda <- max(0, lambda + rho g)

    Args:
        limits: Name -> absolute limit.
        stiffness: rho.
        two_sided: Whether to ask for C = limit instead, without the two max; for comparison.
    """

    def __init__(
        self, limits: Mapping[str, float], stiffness: float = 4.0, *, two_sided: bool = False
    ) -> None:
        self.limits = dict(limits)
        self.stiffness = stiffness
        self.least = -math.inf if two_sided else 0.0
        self.multipliers = dict.fromkeys(limits, 0.0)

    def penalty(self, costs: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of differentiable costs, 0-dim."""
        # The sum over all constraints.
        total = torch.zeros(())
        for name, multiplier in self.multipliers.items():
            # max(0, lambda + rho g)
            push = multiplier + self.stiffness * self._violation(costs, name)
            push = push.clamp_min(self.least)
            total = total + (push.square() - multiplier**2) / (2 * self.stiffness)
        return total

    def update(self, costs: Mapping[str, Tensor]) -> None:
        """Move the multipliers, given the costs of the present parameters."""
        for name, multiplier in self.multipliers.items():
            # lambda <- max(0, lambda + rho g)
            violation = self._violation(costs, name).item()
            self.multipliers[name] = max(self.least, multiplier + self.stiffness * violation)

    def _violation(self, costs: Mapping[str, Tensor], name: str) -> Tensor:
        """Return g = C / limit - 1; it is negative under the limit."""
        return costs[name] / self.limits[name] - 1
