"""Compute biases on the attention logits of keys, from masses and gates."""

from __future__ import annotations

import torch
from torch import Tensor

from deos_fx.operator.scores import LOG_FLOOR

__all__ = [
    "gate_bias",
    "mass_bias",
    "ones_like_tokens",
    "patch_bias",
    "patch_gate_bias",
    "prompt_gates",
]


def patch_bias(mass: Tensor, class_tokens: int, beta: float) -> Tensor:
    """Return `mass_bias` in a vision tower: [I, c + K] from masses [I, K], 0 for c class tokens."""
    # A pad of zeros in front: class tokens stand for themselves.
    return torch.nn.functional.pad(beta * mass.float().log(), (class_tokens, 0))


def mass_bias(mass: Tensor, visual: Tensor, hidden: Tensor, beta: float) -> Tensor:
    """Return the bias on each key's logits in later attention: beta log m.

    With beta = 1 this is the proportional attention of ToMe: softmax then counts a merged token as
    often as there are tokens in it.

    Args:
        mass: [B, K] masses of the visual tokens.
        visual: [B, K] their positions.
        hidden: [B, M, d]; only its shape is read.
        beta: 0 ignores masses, 1 counts a token once for every token it stands for.

    Returns:
        [B, M] in float32, 0 at text tokens.
    """
    bias, mass = torch.zeros(hidden.shape[:2], device=hidden.device), mass.to(hidden.device)
    return bias.scatter(1, visual.to(hidden.device), beta * mass.float().log())


def gate_bias(alive: Tensor, mass: Tensor, beta: Tensor, visual: Tensor, hidden: Tensor) -> Tensor:
    """Return the bias of relaxed reductions on each key's logits: log(gate) + beta log(mass).

    Args:
        alive: Gates [B, V].
        mass: [B, V].
        beta: 0-dim.
        visual: [B, V] positions of the visual tokens.
        hidden: [B, N, d]; only its shape is read.

    Returns:
        [B, N] in float32, 0 at text tokens.
    """
    # A closed gate would give log 0: the floor keeps the gradient finite.
    bias = alive.float().clamp_min(LOG_FLOOR).log() + beta * mass.float().log()
    zeros = torch.zeros(hidden.shape[:2], device=hidden.device)
    return zeros.scatter(1, visual, bias)


def prompt_gates(alive: Tensor, visual: Tensor, hidden: Tensor) -> Tensor:
    """Return the gates [B, N] of all tokens of a prompt, 1 for text.

    Args:
        alive: Gates [B, V] of the visual tokens.
        visual: [B, V] their positions.
        hidden: [B, N, d]; only its shape is read.
    """
    ones = torch.ones(hidden.shape[:2], device=hidden.device)
    return ones.scatter(1, visual, alive.float())


def patch_gate_bias(alive: Tensor, mass: Tensor, beta: Tensor, class_tokens: int) -> Tensor:
    """Return `gate_bias` in a vision tower: [I, c + V] from [I, V], 0 for the c class tokens.

    Args:
        alive: Gates [I, V].
        mass: Masses [I, V].
        beta: 0-dim.
        class_tokens: c.
    """
    bias = alive.float().clamp_min(LOG_FLOOR).log() + beta * mass.float().log()
    return torch.nn.functional.pad(bias, (class_tokens, 0))


def ones_like_tokens(visual: Tensor) -> Tensor:
    """Return open gates [I, V] for visual tokens [I, V, d]."""
    return torch.ones(visual.shape[:2], device=visual.device)
