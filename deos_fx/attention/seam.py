"""The one seam to attention: transformers' `AttentionInterface`.

Scores need queries and keys. One registered attention function receives the post-rotary query and
key of whatever family is running and then calls the implementation the user had chosen (sdpa,
eager). What the keys receive is computed a few queries at a time, O(N) each, and never as the
N x N matrix. The log-mass bias of merging and the log-gate bias of the relaxed form are part of
the mask.

A block that needs the seam is run through a *view*: a shallow copy that shares every weight with
the original and differs only in the attention implementation its config names. The model itself is
never touched, and what was observed is an explicit output of the block's node.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from deos_fx.attention.observation import Asked, Observation
from deos_fx.models.views import shallow_copy

__all__ = [
    "AttentionView",
    "ObservedBlock",
    "PeekedBlock",
    "biased_mask",
    "is_causal",
    "received_attention",
]

_NAME = "deos_fx"

# As many attention rows are held at once, for all heads.
_QUERIES_AT_ONCE = 64

# Votes that are all zero give zeros, not NaN.
_NO_VOTES = 1e-13


@dataclass
class _SeamCall:
    """One call of one block: what to observe, what was seen."""

    implementation: str
    observe: tuple[Observation, ...]
    asked: tuple[Asked, ...]
    tables: Any
    peek: bool = False
    seen: list[Tensor] = field(default_factory=list)


class ObservedBlock(nn.Module):
    """A transformer block whose attention is observed.

    Args:
        block: The model's own block; its weights are shared.
        observe: What to report.

    Raises:
        ValueError: If no submodule of the block names an attention implementation, or an
            observation does not fit its heads.
    """

    def __init__(self, block: nn.Module, observe: tuple[Observation, ...]) -> None:
        super().__init__()
        self.observe = observe
        attention = _attention_of(block)
        if any(observation.heads == "joint" for observation in observe):
            _check_joint(attention)
        self.implementation = str(attention.config._attn_implementation)
        self.block = _seam_view(block)
        # Kept out of the module tree: it shares all weights with the view.
        self._original = (block,)

    def original(self) -> nn.Module:
        """The model's own block, of which this is a view."""
        return self._original[0]

    def forward(
        self,
        *args: Any,
        asked: tuple[Asked, ...] = (),
        **kwargs: Any,
    ) -> Any:
        """Run the block.

        Args:
            asked: The queries of each observation that is about some.
            *args: The block's own arguments.
            **kwargs: The block's own keyword arguments.

        Returns:
            The tuple (output, *observed), in the order of ``observe``.
        """
        call = self._call(asked, kwargs)
        output = self.block(*args, seam=call, **kwargs)
        return (output, *call.seen)

    def extra_repr(self) -> str:
        """What it reports."""
        return ", ".join(map(str, self.observe))

    def _call(self, asked: tuple[Asked, ...], kwargs: dict[str, Any]) -> _SeamCall:
        tables = kwargs.get("position_embeddings")
        return _SeamCall(self.implementation, self.observe, asked, tables)


class PeekedBlock(ObservedBlock):
    """A block that is run up to its attention only, to see what it would attend to.

    PyramidDrop ranks by the queries and keys of the layer behind the cut, PruMerge by those of a
    vision block whose output nobody uses. Its norm, projections and rotary embedding run; its
    attention, its MLP and an update of the cache do not.

    Args:
        block: The model's own block; its weights are shared.
        observe: What to report.
    """

    def __init__(self, block: nn.Module, observe: tuple[Observation, ...]) -> None:
        super().__init__(block, observe)
        path = _attention_modules(block)[0].split(".")
        for depth in range(len(path) + 1):
            _call_directly(self.block.get_submodule(".".join(path[:depth])))

    def forward(
        self,
        *args: Any,
        asked: tuple[Asked, ...] = (),
        **kwargs: Any,
    ) -> Any:
        """Look into the block.

        Args:
            asked: The queries of each observation that is about some.
            *args: The block's own arguments.
            **kwargs: The block's own keyword arguments, without a cache.

        Returns:
            The tuple of what was observed, in the order of ``observe``.
        """
        call = self._call(asked, kwargs)
        call.peek = True
        try:
            self.block(*args, seam=call, **kwargs)
        except _Seen:
            return tuple(call.seen)
        raise AssertionError(f"{type(self.original()).__name__} did not call its attention")


# The call of a block that this thread is in. The views are shared by all threads.
_CALL: ContextVar[_SeamCall | None] = ContextVar("deos_fx_seam_call", default=None)


class _Seen(Exception):  # noqa: N818 - not an error: how a peek leaves the rest of the block out
    """Everything there is to see has been seen."""


def _seam_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: observe, then the user's own implementation."""
    seam = _CALL.get()
    if seam is None:
        raise ValueError(
            f"The layers of this model hand no further arguments on to {type(module).__name__}, so "
            "its attention cannot be observed. Use scores and similarities of the tokens "
            "themselves, such as feature_norm."
        )
    causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    view = AttentionView(query, key, attention_mask, scale, causal, seam.tables)
    asked = iter(seam.asked)
    seam.seen += [_observed(view, item, asked) for item in seam.observe]
    if seam.peek:
        raise _Seen
    attention = AttentionInterface().get_interface(seam.implementation, _eager_attention)
    return attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(_NAME, _seam_attention)


# *** what can be seen ***


@dataclass(frozen=True)
class AttentionView:
    """What an attention function is given.

    Attributes:
        query: [B, H, N, D] after rotary embedding.
        key: [B, H_kv, N, D]; H is a multiple of H_kv.
        mask: None, [B, N] of real keys, boolean or additive, broadcastable to [B, H, N, N], or
            what flex_attention takes.
        scale: Factor of the logits.
        causal: Whether, without a mask of its own, a query sees only keys up to its position.
        tables: Rotary cosines and sines [B or 1, N, D], if the block is given any.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | BlockMask | None
    scale: float
    causal: bool
    tables: Any = None

    def joint(self) -> AttentionView:
        """All heads as one of full width."""
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (self.query, self.key))
        scale = query.shape[-1] ** -0.5
        return AttentionView(query, key, self.mask, scale, self.causal, self.tables)

    def rows(self, positions: Tensor) -> Tensor:
        """Attention [B, H, R, N] of the queries at positions [B, R], in float32."""
        batch, heads, _, dim = self.query.shape
        groups, length = self.key.shape[1:3]
        rows = positions.shape[1]
        index = positions[:, None, :, None].expand(-1, heads, -1, dim)
        chosen = torch.gather(self.query, 2, index).reshape(batch, groups, -1, dim)
        logits = (chosen @ self.key.transpose(2, 3)).float() * self.scale
        return self._masked(logits.reshape(batch, heads, rows, length), positions).softmax(dim=-1)

    def gravity(self, positions: Tensor) -> Tensor:
        """Logits [B, 1, R, N] of all-ones queries and keys, rotated and scaled by D^-1/2.

        A rotation turns the ones of two positions p and r into a product of
        sum_i cos(p f_i) cos(r f_i) + sin(p f_i) sin(r f_i), whatever way dimensions are paired.
        """
        if not isinstance(self.tables, (tuple, list)) or self.tables[0].ndim != 3:
            raise ValueError(
                "Attention can be corrected for rotary positions only in blocks that are given "
                "position_embeddings (cos, sin) of shape [B, N, D]. Use a score without gravity."
            )
        dim = self.query.shape[-1]
        pull: Any = float(dim - self.tables[0].shape[-1])
        for table in self.tables:
            table = table.to(positions.device).float().expand(positions.shape[0], -1, -1)
            index = positions[..., None].expand(-1, -1, table.shape[-1])
            pull = pull + torch.gather(table, 1, index) @ table.transpose(1, 2)
        return pull[:, None] * dim**-0.5

    def _masked(self, logits: Tensor, positions: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float32).min
        mask = self.mask
        if isinstance(mask, BlockMask):
            batch, length = len(logits), logits.shape[-1]
            rows = torch.arange(batch, device=logits.device)[:, None, None, None]
            keys = torch.arange(length, device=logits.device)
            visible = mask.mask_mod(rows, torch.zeros_like(rows), positions[:, None, :, None], keys)
            return logits.masked_fill(~visible, lowest)
        if mask is not None and mask.ndim == 4:
            mask = mask.expand(positions.shape[0], -1, -1, -1)
            index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, logits.shape[-1])
            mask = torch.gather(mask, 2, index)
            if mask.dtype == torch.bool:
                return logits.masked_fill(~mask, lowest)
            return logits + mask.float()
        if self.causal:
            later = torch.arange(logits.shape[-1], device=logits.device) > positions[..., None]
            logits = logits.masked_fill(later[:, None], lowest)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None, :] == 0, lowest)
        return logits


def _observed(view: AttentionView, observation: Observation, asked: Iterator[Asked]) -> Tensor:
    if observation.kind == "keys":
        return view.key.mean(dim=1)
    if observation.kind == "joint_keys":
        return view.key.transpose(1, 2).flatten(2)
    return received_attention(view, observation, next(asked))


def received_attention(view: AttentionView, observation: Observation, asked: Asked) -> Tensor:
    """Attention that every key receives: the mean over queries, weighted by their votes.

    Args:
        view: What the attention function was given.
        observation: How to read it.
        asked: Whose attention.

    Returns:
        [B, N] in float32.
    """
    # Who asks is told where the inputs are; the layer may be on another device.
    positions, votes, among = (
        None if value is None else value.to(view.query.device) for value in asked
    )
    view = view.joint() if observation.heads == "joint" else view
    batch, _, length, _ = view.query.shape
    if positions is None:
        positions = torch.arange(length, device=view.query.device).expand(batch, -1)
    if isinstance(positions.shape[1], int) and not positions.shape[1]:
        # A prompt of images alone has no text: as where no text votes.
        return torch.zeros(batch, length, device=view.query.device)
    received: Any = 0.0
    for part, weight in _few(positions, votes):
        rows = view.rows(part)
        if observation.gravity:
            rows = rows / view.gravity(part)
        if observation.heads == "max":
            rows = rows.amax(dim=1, keepdim=True)
        elif not observation.strongest:
            rows = rows.mean(dim=1, keepdim=True)
        if weight is not None:
            rows = rows * weight[:, None, :, None]
        received = received + rows.sum(dim=2)
    if observation.strongest:
        assert among is not None
        received = _strongest_heads(received, among, observation.strongest)
    received = received.mean(dim=1)
    if votes is None:
        return received / positions.shape[1]
    return received / votes.float().sum(dim=1, keepdim=True).clamp_min(_NO_VOTES)


def _few(positions: Tensor, votes: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A few queries at a time; all at once where an export leaves their number open."""
    count = positions.shape[1]
    known = isinstance(count, int)
    for start in range(0, count, _QUERIES_AT_ONCE) if known else [0]:
        part = slice(start, start + _QUERIES_AT_ONCE) if known else slice(None)
        yield positions[:, part], None if votes is None else votes[:, part].float()


def _strongest_heads(received: Tensor, among: Tensor, count: int) -> Tensor:
    """Of [B, H, N], the `count` heads that give most to the keys at `among` [B, V], per sample."""
    heads, length = received.shape[1:]
    index = among[:, None].expand(-1, heads, -1)
    share = torch.gather(received, 2, index).sum(dim=2)
    chosen = share.topk(min(count, heads), dim=1).indices
    return torch.gather(received, 1, chosen[..., None].expand(-1, -1, length))


# *** masks, and the implementation behind the seam ***


def biased_mask(mask: Tensor | None, key_bias: Tensor, hidden: Tensor, causal: bool) -> Tensor:
    """A block's mask with a bias on the logits of each key.

    Args:
        mask: None, boolean or additive, broadcastable to [B, 1, Q, N].
        key_bias: [B, N], or [B, more] where a cache holds the last N keys only.
        hidden: [B, Q, d]; its shape, precision and device are read.
        causal: Whether, without a mask, a query sees only keys up to its own position.

    Returns:
        Additive [B, 1, Q, N] in the precision of the hidden states.
    """
    bias = key_bias[:, None, None, :].to(hidden)
    lowest = torch.finfo(hidden.dtype).min
    if mask is None:
        queries, keys = hidden.shape[1], key_bias.shape[1]
        if not causal:
            return bias.expand(-1, -1, queries, -1)
        # The last query is the last key: also right when earlier keys come from a cache.
        rows = torch.arange(queries, device=hidden.device) + (keys - queries)
        visible = torch.arange(keys, device=hidden.device) <= rows[:, None]
        return torch.where(visible, bias, lowest)
    mask, bias = mask.to(hidden.device), bias[..., -mask.shape[-1] :]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return (mask + bias).clamp(min=lowest)


def is_causal(block: nn.Module) -> bool:
    """Whether a block without a mask lets a query see only keys up to its own position.

    Raises:
        ValueError: If the block's attention implementation cannot take an additive mask.
    """
    attention = _attention_of(block)
    implementation = str(attention.config._attn_implementation)
    if implementation.startswith(("flash", "flex", "kernels")):
        raise ValueError(
            f"The attention implementation {implementation!r} takes no bias on its logits. Load "
            "the model with attn_implementation='sdpa', or use mass_bias=0."
        )
    return bool(getattr(attention, "is_causal", True))


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


# *** views ***


def _attention_modules(block: nn.Module) -> list[str]:
    return [
        name
        for name, module in block.named_modules()
        if name
        and getattr(getattr(module, "config", None), "_attn_implementation", None) is not None
    ]


def _attention_of(block: nn.Module) -> Any:
    names = _attention_modules(block)
    if not names:
        raise ValueError(
            f"{type(block).__name__} has no submodule whose config names an attention "
            "implementation, so its attention cannot be observed. Use another site."
        )
    return block.get_submodule(names[0])


def _check_joint(attention: Any) -> None:
    config = attention.config
    heads = getattr(config, "num_attention_heads", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads != key_heads:
        raise ValueError(
            f"attention_cls_joint reads attention without heads, which needs as many key heads as "
            f"query heads; {type(attention).__name__} has {key_heads} and {heads}. "
            "Use attention_cls."
        )


def _seam_view(block: nn.Module) -> nn.Module:
    """A shallow copy of the block whose attention goes through the seam."""
    view = shallow_copy(block)
    for name in _attention_modules(block):
        parent = view
        *path, last = name.split(".")
        for part in path:
            parent._modules[part] = shallow_copy(parent._modules[part])
            parent = parent._modules[part]
        attention = shallow_copy(parent._modules[last])
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = _NAME
        attention.deos_fx_forward = vars(attention).get("forward")
        attention.forward = partial(_with_seam, attention)
        parent._modules[last] = attention
    return view


def _call_directly(module: nn.Module) -> None:
    """Let calls of a view go straight to its forward.

    An export keeps a stack of the modules that are running, which leaving one by an exception would
    not unwind.
    """
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    members = {"__module__": kind.__module__, "__call__": call}
    module.__class__ = type(kind.__name__, (kind,), members)


def _with_seam(module: Any, *args: Any, seam: _SeamCall | None = None, **kwargs: Any) -> Any:
    """The forward of a view's attention, which leaves the call where `_seam_attention` finds it.

    Not every family hands unknown arguments on to the attention function (SigLIP does not). Other
    parts that know the attention implementation (an MLP with a config) are run without a call.
    """
    forward = module.deos_fx_forward or partial(type(module).forward, module)
    token = _CALL.set(seam)
    try:
        return forward(*args, **kwargs)
    finally:
        _CALL.reset(token)
