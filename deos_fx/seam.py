"""The one seam to attention: transformers' `AttentionInterface`.

Scores need queries and keys, merging needs a log-mass bias, the relaxed form needs a log-gate
bias. All of it goes through one registered attention function, which receives the post-rotary
query and key of whatever family is running, adds the bias to the mask and then calls the
implementation the user had chosen (sdpa, flash, eager). It computes the attention *rows* of a few
query tokens, O(N), and never the N x N matrix.

A block that needs the seam is run through a *view*: a shallow copy that shares every weight with
the original and differs only in the attention implementation its config names. The model itself is
never touched, and what was observed is an explicit output of the block's node.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

__all__ = ["OBSERVATIONS", "ObservedBlock", "attention_rows"]

_NAME = "deos_fx"

# What a block can report about its attention, beside its own output.
OBSERVATIONS = ("rows", "keys")


@dataclass
class _SeamCall:
    """One call of one block: what to add, what to observe, what was seen."""

    implementation: str
    key_bias: Tensor | None
    queries: Tensor | None
    observe: tuple[str, ...]
    seen: dict[str, Tensor] = field(default_factory=dict)


class ObservedBlock(nn.Module):
    """A transformer block whose attention is biased and observed.

    Args:
        block: The model's own block; its weights are shared.
        observe: Any of `OBSERVATIONS`: ``rows`` (attention of some queries over all keys, mean
            over heads) and ``keys`` (keys, mean over heads).

    Raises:
        ValueError: If no submodule of the block names an attention implementation.
    """

    def __init__(self, block: nn.Module, observe: tuple[str, ...]) -> None:
        super().__init__()
        self.observe = observe
        self.implementation = _attention_implementation(block)
        self.block = _seam_view(block)
        # Kept out of the module tree: it shares all weights with the view.
        self._original = (block,)

    def original(self) -> nn.Module:
        """The model's own block, of which this is a view."""
        return self._original[0]

    def forward(
        self,
        *args: Any,
        key_bias: Tensor | None = None,
        queries: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the block.

        Args:
            key_bias: [B, N] added to the attention logits of each key.
            queries: [B, R] positions of the queries whose attention ``rows`` are observed.
            *args: The block's own arguments.
            **kwargs: The block's own keyword arguments.

        Returns:
            The block's output; if anything is observed, a tuple (output, *observed) with
            ``rows`` [B, R, N] and ``keys`` [B, N, D] in the order of ``observe``.
        """
        call = _SeamCall(self.implementation, key_bias, queries, self.observe)
        output = self.block(*args, seam=call, **kwargs)
        if not self.observe:
            return output
        return (output, *(call.seen[name] for name in self.observe))


def _seam_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    seam: _SeamCall,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: bias, observe, then the user's own implementation."""
    causal = getattr(module, "is_causal", True)
    if seam.key_bias is not None:
        attention_mask = _additive_mask(attention_mask, seam.key_bias, query, key, causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if "rows" in seam.observe:
        assert seam.queries is not None
        seam.seen["rows"] = attention_rows(
            query, key, attention_mask, seam.queries, scale, causal=causal
        )
    if "keys" in seam.observe:
        seam.seen["keys"] = key.mean(dim=1)
    attention = AttentionInterface().get_interface(seam.implementation, _eager_attention)
    return attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(_NAME, _seam_attention)


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    scale: float,
    *,
    causal: bool,
) -> Tensor:
    """Softmax attention of a few query tokens over all keys, mean over heads.

    Args:
        query: [B, H, N, D] after rotary embedding.
        key: [B, H_kv, N, D]; H is a multiple of H_kv.
        mask: None, boolean or additive, broadcastable to [B, H, N, N].
        positions: [B, R] indices of the queries.
        scale: Factor of the logits.
        causal: Whether, without a mask, a query sees only keys up to its own position.

    Returns:
        [B, R, N] in float32; each row sums to 1.
    """
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    rows = positions.shape[1]
    index = positions[:, None, :, None].expand(-1, heads, -1, dim)
    chosen = torch.gather(query, 2, index).reshape(batch, groups, -1, dim)
    logits = (chosen @ key.transpose(2, 3)).float() * scale
    logits = logits.reshape(batch, heads, rows, -1)
    if mask is not None:
        mask_rows = _rows_of_mask(mask, positions, logits.shape[-1])
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask_rows, torch.finfo(torch.float32).min)
        else:
            logits = logits + mask_rows.float()
    elif causal:
        later = torch.arange(logits.shape[-1], device=key.device) > positions[..., None]
        logits = logits.masked_fill(later[:, None], torch.finfo(torch.float32).min)
    return logits.softmax(dim=-1).mean(dim=1)


def _rows_of_mask(mask: Tensor, positions: Tensor, length: int) -> Tensor:
    """[B, 1 or H, R, N]: the mask rows of the chosen queries."""
    mask = mask.expand(positions.shape[0], -1, -1, -1)
    index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, length)
    return torch.gather(mask, 2, index)


def _additive_mask(
    mask: Tensor | None, key_bias: Tensor, query: Tensor, key: Tensor, causal: bool
) -> Tensor:
    """Mask and key bias as one additive mask [B, 1, Q, N] in the query's dtype."""
    bias = key_bias[:, None, None, :].to(query.dtype)
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        if not causal:
            return bias.expand(-1, -1, queries, -1)
        # The last query is the last key: also right when earlier keys come from a cache.
        rows = torch.arange(queries, device=key.device) + (keys - queries)
        visible = torch.arange(keys, device=key.device) <= rows[:, None]
        return torch.where(visible, bias, lowest)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return (mask + bias).clamp(min=lowest)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Each model file has its own eager function; a view calls that of its own file."""
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return eager(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


def _attention_modules(block: nn.Module) -> list[str]:
    return [
        name
        for name, module in block.named_modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) is not None
    ]


def _attention_implementation(block: nn.Module) -> str:
    names = _attention_modules(block)
    if not names:
        raise ValueError(
            f"{type(block).__name__} has no submodule whose config names an attention "
            "implementation, so its attention cannot be observed. Use another site."
        )
    attention: Any = block.get_submodule(names[0])
    return str(attention.config._attn_implementation)


def _seam_view(block: nn.Module) -> nn.Module:
    """A shallow copy of the block whose attention goes through the seam.

    Parameters and buffers are the same dict objects as the original's, so moving or loading the
    model moves the view.
    """
    view = _shallow_copy(block)
    for name in _attention_modules(block):
        parent = view
        *path, last = name.split(".")
        for part in path:
            parent._modules[part] = _shallow_copy(parent._modules[part])
            parent = parent._modules[part]
        attention = _shallow_copy(parent._modules[last])
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = _NAME
        parent._modules[last] = attention
    return view


def _shallow_copy(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
