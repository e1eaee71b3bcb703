"""The one seam to attention: transformers' `AttentionInterface`.

Scores need queries and keys. One registered attention function receives the post-rotary query and
key of any family that is running, and then calls the implementation that the user chose (sdpa,
eager). The attention that keys receive is computed a few queries at a time, O(N) each, and never as
the N x N matrix. The log-mass bias of merging and the log-gate bias of the relaxed form are part of
the mask.

A block that needs the seam is run through a *view*: a shallow copy that shares every weight with
the original and differs only in its attention, whose config names the seam. So the model itself is
never changed. Observations are explicit outputs of the block's node.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils.output_capturing import CompileableContextVar

from deos_fx.attention.mask import attention_modules, attention_of, hands_on
from deos_fx.attention.observation import Asked, AttentionView, Observation, observe
from deos_fx.models.sharded import class_of
from deos_fx.models.upstream import CACHE
from deos_fx.models.views import shallow_copy
from deos_fx.tokens.turn import TurnCache

__all__ = ["ObservedBlock", "PeekedBlock"]

_NAME = "deos_fx"


@dataclass
class _SeamCall:
    """One call of one block: the observations to make, and the results so far.

    Attributes:
        implementation: The implementation that the user chose.
        observe: The observations.
        asked: Their queries.
        tables: Rotary tables.
        observed: How many keys are observed, see `AttentionView`.
        apart: Additive [1, 1, N, N], which the block itself does not know of; None without it.
        peek: Whether the rest of the block is left out.
        seen: The results so far.
    """

    implementation: str
    observe: tuple[Observation, ...]
    asked: tuple[Asked, ...]
    tables: Any
    observed: int | None = None
    apart: Tensor | None = None
    peek: bool = False
    seen: list[Tensor] = field(default_factory=list)


class ObservedBlock(nn.Module):
    """A transformer block whose attention is observed.

    Args:
        block: The model's own block; its weights are shared.
        observe: The observations to report.

    Raises:
        ValueError: If no submodule of the block names an attention implementation, or an
            observation does not fit its heads.
    """

    def __init__(self, block: nn.Module, observe: tuple[Observation, ...]) -> None:
        super().__init__()
        self.observe = observe
        attention = attention_of(block)
        if any(observation.heads == "joint" for observation in observe):
            _check_joint(attention)
        self.implementation = str(attention.config._attn_implementation)
        self.hands_on = hands_on(block)
        self.block = _seam_view(block)
        # A tuple keeps it out of the module tree, since it shares all weights with the view.
        self._original = (block,)

    def original(self) -> nn.Module:
        """Return the model's own block, of which this is a view."""
        return self._original[0]

    def forward(
        self,
        *args: Any,
        asked: tuple[Asked, ...] = (),
        apart: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the block.

        Args:
            asked: The queries of each observation of attention, in order; keys need none.
            apart: Additive mask [1, 1, N, N] for a block that is given none.
            *args: The block's own arguments.
            **kwargs: The block's own keyword arguments.

        Returns:
            The tuple (output, *observed), in the order of ``observe``.
        """
        call = self._call(asked, args[0], kwargs)
        call.apart = apart
        output = self._run(call, *args, **kwargs)
        return (output, *call.seen)

    def extra_repr(self) -> str:
        """Return the observations that it reports."""
        return ", ".join(map(str, self.observe))

    def _run(self, call: _SeamCall, *args: Any, **kwargs: Any) -> Any:
        """Run the view of the block in a call of the seam."""
        if self.hands_on:
            return self.block(*args, seam=call, **kwargs)
        # Case: the block takes no further arguments, so the call is there for all of its parts.
        token = _CALL.set(call)
        try:
            return self.block(*args, **kwargs)
        finally:
            _CALL.reset(token)

    def _call(self, asked: tuple[Asked, ...], hidden: Tensor, kwargs: dict[str, Any]) -> _SeamCall:
        tables = kwargs.get("position_embeddings")
        # In a later turn, there are keys of earlier ones in front of those of the new tokens.
        observed = hidden.shape[1] if isinstance(kwargs.get(CACHE), TurnCache) else None
        return _SeamCall(self.implementation, self.observe, asked, tables, observed)


class PeekedBlock(ObservedBlock):
    """A block that is run only up to its attention, to observe its queries and keys.

    PyramidDrop ranks by the queries and keys of the layer after the cut, PruMerge by those of a
    vision block whose output is not used. The block's norm, projections and rotary embedding run;
    its attention, its MLP and an update of the cache do not.

    Args:
        block: The model's own block; its weights are shared.
        observe: The observations to report.
    """

    def __init__(self, block: nn.Module, observe: tuple[Observation, ...]) -> None:
        super().__init__(block, observe)
        # Every module from the block to its attention is left by an exception.
        path = attention_modules(block)[0].split(".")
        for depth in range(len(path) + 1):
            _call_directly(self.block.get_submodule(".".join(path[:depth])))

    def forward(
        self,
        *args: Any,
        asked: tuple[Asked, ...] = (),
        **kwargs: Any,
    ) -> Any:
        """Run the block up to its attention.

        Args:
            asked: The queries of each observation of attention, in order; keys need none.
            *args: The block's own arguments.
            **kwargs: The block's own keyword arguments; no cache but that of a later turn.

        Returns:
            The tuple of the observations, in the order of ``observe``.
        """
        call = self._call(asked, args[0], kwargs)
        call.peek = True
        if isinstance(kwargs.get(CACHE), TurnCache):
            # Only the layer itself adds to the cache, when it runs.
            kwargs[CACHE] = kwargs[CACHE].copied()
        try:
            self._run(call, *args, **kwargs)
        except _Seen:
            return tuple(call.seen)
        raise AssertionError(f"{type(self.original()).__name__} did not call its attention")


# The call of a block that is running in this thread. All threads share the views, so these cannot
# hold it.
_CALL = CompileableContextVar("deos_fx_seam_call")


class _Seen(Exception):  # noqa: N818 - not an error: how a peek leaves the rest of the block out
    """All observations of a peek are made, so the rest of the block need not run."""


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
    """Observe, then call the implementation that the user chose.

    This is the attention function that is registered with transformers.
    """
    seam = _CALL.get()
    if seam is None:
        raise ValueError(
            f"The layers of this model hand no further arguments on to {type(module).__name__}, so "
            "its attention cannot be observed. Use scores and similarities of the tokens "
            "themselves, such as feature_norm."
        )
    if seam.apart is not None:
        if attention_mask is not None:
            raise ValueError(
                f"{type(module).__name__} has a mask of its own beside rows or windows of patches, "
                "which cannot be exported. Run the reduced model in PyTorch, or reduce after the "
                "vision tower."
            )
        attention_mask = seam.apart
    if kwargs.get("indices") is not None:
        # Case: keys chosen by an index, which the block leaves to every implementation that it does
        # not know to mask.
        attention_mask = _of_chosen(attention_mask, kwargs["indices"], query, key)
    causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias, sinks = kwargs.get("position_bias"), kwargs.get("s_aux")
    view = AttentionView(
        query, key, attention_mask, scale, causal, seam.tables, bias, seam.observed, sinks
    )
    # Observations of keys ask for nothing, so there may be fewer queries than observations.
    asked = iter(seam.asked)
    seam.seen += [observe(view, item, asked) for item in seam.observe]
    if seam.peek:
        # Nothing else of the block is needed.
        raise _Seen
    attention = AttentionInterface().get_interface(seam.implementation, _eager_attention)
    return attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _of_chosen(mask: Tensor | None, indices: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Restrict a mask to chosen keys.

    Args:
        mask: Boolean or additive [B, 1, Q, N]; None if every query sees all keys.
        indices: [B, Q, k] keys that are chosen for each query.
        query: [B, H, Q, D].
        key: [B, H, N, D].
    """
    others = indices.new_ones((*indices.shape[:2], key.shape[2]), dtype=torch.bool)
    others = others.scatter(2, indices.long(), False)[:, None]
    if mask is None or mask.dtype == torch.bool:
        return ~others if mask is None else mask & ~others
    return mask.masked_fill(others, torch.finfo(query.dtype).min)


AttentionInterface.register(_NAME, _seam_attention)


# *** the implementation that the seam calls ***


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
    """Call the eager function of the module's own model file.

    Every file has one, and transformers does not register it under a name.
    """
    eager = vars(sys.modules[class_of(module).__module__])["eager_attention_forward"]
    return eager(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


# *** views ***


def _check_joint(attention: Any) -> None:
    """Refuse attention of full width where query heads and key heads differ in number."""
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
    """Return a shallow copy of the block whose attention goes through the seam."""
    view = shallow_copy(block)
    names = attention_modules(block)
    for name in names:
        # 1. Copy every module on the path to the attention, so that the original is not changed.
        parent = view
        *path, last = name.split(".")
        for part in path:
            parent._modules[part] = shallow_copy(parent._modules[part])
            parent = parent._modules[part]
        # 2. The copy of the attention names the seam in a config of its own.
        attention = shallow_copy(parent._modules[last])
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = _NAME
        # 3. Its forward notes the call, unless it is a part of one that does, such as an index of
        # keys. A forward of the instance (accelerate's) is still run.
        if hands_on(block) and not any(name.startswith(f"{other}.") for other in names):
            attention.deos_fx_forward = vars(attention).get("forward")
            attention.forward = partial(_with_seam, attention)
        parent._modules[last] = attention
    return view


def _call_directly(module: nn.Module) -> None:
    """Make calls of a view go straight to its forward.

    While it traces, an export keeps a stack of the modules that are running. A peek leaves modules
    by an exception, which would not unwind that stack.
    """
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    members = {"__module__": kind.__module__, "__call__": call}
    module.__class__ = type(kind.__name__, (kind,), members)


def _with_seam(module: Any, *args: Any, seam: _SeamCall | None = None, **kwargs: Any) -> Any:
    """Run the forward of a view's attention, with the call where `_seam_attention` finds it.

    A context variable holds the call, since not every family passes unknown arguments on to the
    attention function (SigLIP does not). Other parts whose config names the attention
    implementation (an MLP) run without a call.
    """
    forward = module.deos_fx_forward or partial(type(module).forward, module)
    token = _CALL.set(seam)
    try:
        return forward(*args, **kwargs)
    finally:
        _CALL.reset(token)
