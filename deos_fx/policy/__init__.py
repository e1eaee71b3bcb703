"""What to do, as data: reductions, policies, and limits on what they cost.

Public names are imported at their first use, so that a list of policies does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deos_fx.deferred import deferred

if TYPE_CHECKING:
    from deos_fx.policy.budget import Budget
    from deos_fx.policy.policy import ModelSignature, Policy
    from deos_fx.policy.reduction import Reduction
    from deos_fx.policy.tier import Tier

__all__ = ["Budget", "ModelSignature", "Policy", "Reduction", "Tier"]

__getattr__ = deferred(
    __name__,
    {
        "Budget": "budget",
        "ModelSignature": "policy",
        "Policy": "policy",
        "Reduction": "reduction",
        "Tier": "tier",
    },
)
