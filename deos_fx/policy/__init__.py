"""What to do, as data: reductions, policies, and limits on what they cost."""

from __future__ import annotations

from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import ModelSignature, Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

__all__ = ["Budget", "ModelSignature", "Policy", "Reduction", "Tier"]
