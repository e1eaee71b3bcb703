"""Make a twin of a model that has shapes and no data, and count its FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.integrations.moe import batched_mm_experts_forward

from deos_fx.models.known_shapes import META, on_meta, tensors_in, without_values
from deos_fx.models.shapes_only import ListedNumbers, OnZeros
from deos_fx.models.sharded import without_shards
from deos_fx.models.views import AnyLinear, has_codes, linear_sizes

__all__ = ["count_flops", "twin_of", "whole_numbers"]


class _NoModules:
    """Stand-in for the counter's module tracker, which hooks every module of the process."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *exception: object) -> None:
        """Undo nothing."""


def count_flops() -> FlopCounterMode:
    """Make a counter of all FLOPs while it is entered, without a table by module.

    By default the counter tracks the running module by hooks on all modules of the process. Threads
    that run another model would run these hooks too.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter


@contextmanager
def whole_numbers() -> Iterator[None]:
    """Run code of a twin with the values of what depends on no weight, also of lists of numbers."""
    with ListedNumbers(), _WholeNumbers():
        yield


class _WholeNumbers(TorchDispatchMode):
    """A mode that computes for real what depends on no weight: positions, sizes of images, masks.

    Model code reads these values and wants them on the weights' device, which is meta here. Unlike
    in `ShapesOnly`, parameters are on meta already.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(operand.is_meta for operand in tensors_in(args, kwargs)):
            # Case: the result depends on weights. How many rows a mask selects does not.
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], _places(args[1]))
            if func is torch.ops.aten._to_copy.default:
                kwargs = {**kwargs, "device": META}
            return on_meta(func, args, kwargs)
        if "device" in kwargs and func.overloadpacket not in _BUFFERS:
            # Case: no operand depends on weights, so values stay, even if asked for on meta.
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


def _places(indices: Any) -> list[Tensor | None]:
    """Turn masks whose values are known into the places that they select."""
    found: list[Tensor | None] = []
    for index in indices:
        known = index is not None and index.dtype == torch.bool and not index.is_meta
        found.extend(index.nonzero().unbind(dim=1) if known else [index])
    return found


# Buffers that code fills with values that depend on weights.
_BUFFERS = {torch.ops.aten.empty, torch.ops.aten.zeros, torch.ops.aten.new_zeros}


def twin_of(model: PreTrainedModel) -> Any:
    """Return a copy of a model on the meta device, whose attention and experts count in full.

    Quantised linear layers that tell their two sizes become plain ones; the others are run.
    """
    # A sharded module cannot be copied.
    whole: Any = without_shards(model)
    # deepcopy takes what is in `known`, by identity, for a copy that exists already: so weights are
    # never copied, and layers are exchanged on the way.
    known: dict[int, Any] = {}
    for module in whole.modules():
        sizes = linear_sizes(module)
        if sizes is not None:
            bias = getattr(module, "bias", None) is not None
            known[id(module)] = AnyLinear(*sizes, bias, device="meta", dtype=model.dtype)
        elif has_codes(module):
            known[id(module)] = _Counted(module)
    for tensor in (*whole.parameters(), *whole.buffers()):
        empty = without_values(tensor)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.is_floating_point())
        known[id(tensor)] = empty
    # accelerate's hooks move weights and inputs between devices; here there is nothing to move.
    known |= {id(m._hf_hook): None for m in whole.modules() if hasattr(m, "_hf_hook")}
    twin = copy.deepcopy(whole, known)
    modules: list[Any] = [*twin.modules()]
    for module in modules:
        # The forward that the hook replaced. Only what counts in full is asked for below: other
        # implementations of attention and experts run kernels that the counter does not know.
        if hasattr(module, "_hf_hook"):
            module.forward = module._old_forward
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = "eager"
            config._experts_implementation_internal = "batched_mm"
        if _loops_over_experts(module):
            vars(module).update(_PLAIN_EXPERTS)
            module.forward = partial(batched_mm_experts_forward, module)
    return twin


# What transformers' decorator of experts says of those that it is not on.
_PLAIN_EXPERTS = {"has_gate": True} | dict.fromkeys(
    ("has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"), False
)


def _loops_over_experts(module: nn.Module) -> bool:
    """Return whether a module runs the chosen experts in a loop and has no other implementation."""
    parts = ("gate_up_proj", "down_proj", "_apply_gate")
    return all(hasattr(module, name) for name in parts) and not hasattr(module, "has_gate")


class _Counted(OnZeros):
    """A quantised layer that does not tell its sizes: it is run on zeros and counted."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with count_flops() as counter:
            result = super().run(*args, **kwargs)
        self.flops = counter.get_total_flops()
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        if not self.flops and any(x.is_floating_point() for x in pytree.tree_leaves(args)):
            raise ValueError(
                f"What a {type(self.layer).__name__} costs is not known: it is quantised, its "
                "kernel cannot be counted, and it has no in_features and out_features. Set these, "
                "or give a policy or limit visual_tokens, which need no costs."
            )
        # Report the FLOPs to the active counter: a product of this length counts two per element.
        half = torch.empty(self.flops // 2, device="meta")
        torch.mm(half[None], half[:, None])
        return result
