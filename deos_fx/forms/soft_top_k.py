"""Gates that open for the largest scores and sum to a given count, with exact gradients.

The threshold is found without gradients, and the gradients of the gates are added by hand: a term
such as ``slope * (score - score.detach())`` is zero but has the gradient ``slope``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.operator.scores import LOG_FLOOR

__all__ = ["SATURATED", "soft_top_k"]

SATURATED = 40.0
"""A logit whose sigmoid is 0 or 1 to double precision."""


def soft_top_k(score: Tensor, count: Tensor | float, temperature: float, alive: Tensor) -> Tensor:
    """Return gates in [0, alive] that open for the largest scores and sum to ``count`` per row.

    g_i = alive_i * sigmoid((s_i - t) / temperature), with t such that sum_i g_i = count. The
    threshold is found by bisection, and gradients follow from the implicit function theorem: with
    the slopes h_i = dg_i/ds_i at fixed t and w_i = h_i / sum_j h_j,

        dg_i = h_i (ds_i - sum_j w_j ds_j) + w_i (dcount - sum_j sigmoid_j dalive_j)
               + sigmoid_i dalive_i.

    w is a softmax in closed form, so the gradient to the count is finite even where all slopes
    underflow (at saturated gates, where the token next to leave or to enter gets all of it).

    Args:
        score: [B, V].
        count: At most the sum of ``alive``; one number for all rows, or [B].
        temperature: Width of the transition, in units of the score.
        alive: Gates so far [B, V], in [0, 1].
    """
    count = torch.as_tensor(count, dtype=score.dtype, device=score.device).expand(score.shape[:1])
    with torch.no_grad():
        gates, opening, share = _solve(score.double(), count.double(), temperature, alive.double())
        slope = gates * (1 - opening) / temperature
        gates, opening, share, slope = (x.to(score.dtype) for x in (gates, opening, share, slope))
    # ds, dcount and dalive of the docstring: zero in value.
    score_step, count_step, alive_step = (x - x.detach() for x in (score, count, alive))
    score_step = score_step - (share * score_step).sum(dim=-1, keepdim=True)
    alive_step = opening * alive_step
    # What opens elsewhere as the count grows or other gates close.
    freed = count_step.unsqueeze(-1) - alive_step.sum(dim=-1, keepdim=True)
    return gates + slope * score_step + share * freed + alive_step


def _solve(
    score: Tensor, count: Tensor, temperature: float, alive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gates, the sigmoids and the shares w of ``soft_top_k``, all [B, V]."""
    count = torch.minimum(count, alive.sum(dim=-1)).unsqueeze(-1)
    low = score.amin(dim=-1, keepdim=True) - SATURATED * temperature
    high = score.amax(dim=-1, keepdim=True) + SATURATED * temperature
    # After 64 halvings, the threshold is as exact as double precision allows.
    for _ in range(64):
        # Bisection: a threshold that is too low opens the gates too far.
        middle = (low + high) / 2
        total = (alive * ((score - middle) / temperature).sigmoid()).sum(dim=-1, keepdim=True)
        low, high = (
            torch.where(total > count, middle, low),
            torch.where(total > count, high, middle),
        )
    x = (score - low) / temperature
    # w_i = alive_i sigmoid(x_i) sigmoid(-x_i) / sum, computed from logarithms.
    share = (alive.clamp_min(LOG_FLOOR).log() + F.logsigmoid(x) + F.logsigmoid(-x)).softmax(dim=-1)
    opening = x.sigmoid()
    gates = alive * opening
    # Spread the remaining error of the bisection in proportion to the slopes.
    gates = gates + share * (count - gates.sum(dim=-1, keepdim=True))
    return torch.minimum(gates.clamp_min(0), alive), opening, share
