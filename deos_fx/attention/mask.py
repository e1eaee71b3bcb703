"""Attention masks with a bias on the logits of each key."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["attention_modules", "attention_of", "biased_mask", "hands_on", "is_causal"]


def biased_mask(mask: Tensor | None, key_bias: Tensor, hidden: Tensor, causal: bool) -> Tensor:
    """Return a block's mask with a bias on the logits of each key.

    Args:
        mask: None, boolean or additive, broadcastable to [B, 1, Q, N].
        key_bias: [B, N], or longer if a cache with a window holds only the last N keys.
        hidden: [B, Q, d]; its shape, precision and device are read.
        causal: Whether a query sees only keys up to its own position if there is no mask.

    Returns:
        Additive [B, 1, Q, N] in the precision of the hidden states.
    """
    bias = key_bias[:, None, None, :].to(hidden)
    lowest = torch.finfo(hidden.dtype).min
    if mask is None:
        # Case: no mask. The kernel knows about causality, which a mask with a bias has to say
        # itself.
        queries, keys = hidden.shape[1], key_bias.shape[1]
        if not causal:
            # Case: every query sees all keys.
            return bias.expand(-1, -1, queries, -1)
        # The last query belongs to the last key, also if earlier keys come from a cache.
        rows = torch.arange(queries, device=hidden.device) + (keys - queries)
        visible = torch.arange(keys, device=hidden.device) <= rows[:, None]
        return torch.where(visible, bias, lowest)
    mask, bias = mask.to(hidden.device), bias[..., -mask.shape[-1] :]
    if mask.dtype == torch.bool:
        # Case: a boolean mask.
        return torch.where(mask, bias, lowest)
    # Case: an additive mask. Masked keys are at the lowest value already, and a sum must not
    # overflow.
    return (mask + bias).clamp(min=lowest)


def is_causal(block: nn.Module) -> bool:
    """Return whether a query of a block sees only keys up to its own position if there is no mask.

    Raises:
        ValueError: If the block's attention implementation cannot take an additive mask.
    """
    attention = attention_of(block)
    implementation = str(attention.config._attn_implementation)
    if implementation.startswith(("flash", "flex", "kernels")):
        raise ValueError(
            f"The attention implementation {implementation!r} takes no bias on its logits. Load "
            "the model with attn_implementation='sdpa', or use mass_bias=0."
        )
    # transformers takes attention for causal unless it says otherwise.
    return bool(getattr(attention, "is_causal", True))


def attention_modules(block: nn.Module) -> list[str]:
    """List the submodules of a block whose config names an attention implementation.

    A block inside of a wrapper has such a config, too, and is none of them.
    """
    return [
        name
        for name, module in block.named_modules()
        if name
        and not isinstance(module, GradientCheckpointingLayer)
        and getattr(getattr(module, "config", None), "_attn_implementation", None) is not None
    ]


def attention_of(block: nn.Module) -> Any:
    """Return the attention of a block.

    Raises:
        ValueError: If no submodule names an attention implementation.
    """
    names = attention_modules(block)
    if not names:
        raise ValueError(
            f"{type(block).__name__} has no submodule whose config names an attention "
            "implementation, so its attention cannot be observed. Use another site."
        )
    # The attention is the first one; an MLP may have such a config, too.
    return block.get_submodule(names[0])


def hands_on(block: nn.Module) -> bool:
    """Return whether a block takes further arguments, which it hands on to its attention."""
    parameters = inspect.signature(type(block).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)
