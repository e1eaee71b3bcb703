"""Turn the numbers of a policy into unbounded parameters, and these into numbers again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deos_fx.forms.soft_top_k import SATURATED
from deos_fx.policy.reduction import RANGES

__all__ = [
    "HARD",
    "SOFT",
    "STEEP",
    "diversity_of",
    "in_range",
    "logit",
    "main_parts",
    "mass_bias_of",
    "parameter",
    "rounded",
    "sharpness_of",
    "sizes_of",
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


# *** numbers that a policy may hold, from parameters without bounds ***


def in_range(name: str, value: Tensor) -> Tensor:
    """Return a value within the range of a number of a reduction, as 0-dim tensor."""
    return value.clamp(*RANGES[name])


def mass_bias_of(parameter: Tensor) -> Tensor:
    """Return the mass bias of a parameter."""
    return in_range("mass_bias", F.softplus(parameter))


def diversity_of(parameter: Tensor) -> Tensor:
    """Return the diversity of a parameter."""
    return in_range("diversity", F.softplus(parameter))


def sharpness_of(parameter: Tensor) -> Tensor:
    """Return the sharpness, of which a parameter is the logarithm."""
    # Clamped twice: the exponential of a large number is infinite, and has no gradient.
    return in_range("sharpness", parameter.clamp_max(STEEP).exp())


def sizes_of(parameters: Tensor) -> Tensor:
    """Return the weights of scores that may grow or fade beside learned ones, [scores]."""
    return parameters.clamp(-STEEP, STEEP).exp()


# *** the numbers of a policy ***


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
