"""An augmented Lagrangian for one-sided constraints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["AugmentedLagrangian"]


class AugmentedLagrangian:
    """Penalty for constraints C <= limit; being under a limit costs and earns nothing.

    With the violation g = C / limit - 1, the multiplier lambda >= 0 and the stiffness rho,

        penalty = (max(0, lambda + rho g)^2 - lambda^2) / (2 rho)      (Rockafellar 1973)
        lambda <- max(0, lambda + rho g)

    Args:
        limits: Name -> absolute limit.
        stiffness: rho.
    """

    def __init__(self, limits: Mapping[str, float], stiffness: float = 4.0) -> None:
        self.limits = dict(limits)
        self.stiffness = stiffness
        self.multipliers = dict.fromkeys(limits, 0.0)

    def penalty(self, costs: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of differentiable costs, 0-dim."""
        total = torch.zeros(())
        for name, multiplier in self.multipliers.items():
            push = (multiplier + self.stiffness * self._violation(costs, name)).clamp_min(0)
            total = total + (push.square() - multiplier**2) / (2 * self.stiffness)
        return total

    def update(self, costs: Mapping[str, Tensor]) -> None:
        """Move the multipliers after some steps."""
        for name, multiplier in self.multipliers.items():
            violation = self._violation(costs, name).item()
            self.multipliers[name] = max(0.0, multiplier + self.stiffness * violation)

    def _violation(self, costs: Mapping[str, Tensor], name: str) -> Tensor:
        """Return g = C / limit - 1; it is negative under the limit."""
        return costs[name] / self.limits[name] - 1
