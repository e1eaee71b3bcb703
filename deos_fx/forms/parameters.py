"""Turn the numbers of a policy into unbounded parameters, and these into numbers again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from deos_fx.forms.soft_top_k import SATURATED

__all__ = [
    "HARD",
    "SOFT",
    "STEEP",
    "logit",
    "main_parts",
    "parameter",
    "rounded",
    "snapped",
    "softplus_inverse",
]

HARD = 1e-3
"""Below this temperature, tokens are assigned to the nearest token only."""
SOFT = 1e3
"""From this temperature on, tokens are assigned to all tokens equally."""
STEEP = math.log(1e3)
"""The largest logarithm of a sharpness."""
NEGLIGIBLE = 0.005
"""Parameters closer than this to a value that removes their operator are set to that value."""


def parameter(value: float | list[float]) -> nn.Parameter:
    """Make a parameter in float32, whatever the default dtype is."""
    return nn.Parameter(torch.tensor(value, dtype=torch.float32))


def logit(value: float) -> float:
    """Invert the sigmoid; 0 and 1 become saturated logits."""
    if value <= 0 or value >= 1:
        return SATURATED if value >= 1 else -SATURATED
    return math.log(value / (1 - value))


def softplus_inverse(value: float) -> float:
    """Invert the softplus; 0 becomes a saturated value."""
    return value + math.log(-math.expm1(-value)) if value > 0 else -SATURATED


def rounded(value: float) -> float:
    """Round to four decimals, and to exactly 0 or 1 where the difference is negligible."""
    for special in (0.0, 1.0):
        if abs(value - special) < NEGLIGIBLE:
            return special
    return round(value, 4)


def snapped(temperature: float) -> float:
    """Round a temperature to four digits, or to 0 or infinity beyond `HARD` and `SOFT`."""
    if temperature < HARD:
        return 0.0
    return math.inf if temperature >= SOFT else float(f"{temperature:.4g}")


def main_parts(weights: Mapping[str, float]) -> dict[str, float]:
    """Round weights, and leave out negligible ones; a single weight becomes 1."""
    kept = {name: round(weight, 4) for name, weight in weights.items() if weight >= NEGLIGIBLE}
    return kept if len(weights) != 1 else dict.fromkeys(weights, 1.0)
