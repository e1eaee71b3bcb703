"""Modules with hooks of accelerate, which run a model on several devices or from the disk.

A hook replaces a module's forward by one that is bound to this very module and brings weights and
arguments to the device where the module runs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from typing import Any

import torch
from torch import nn

__all__ = ["execution_device", "has_several_devices", "is_offloaded", "shallow_copy"]


def execution_device(module: nn.Module) -> torch.device:
    """Return the device where the first part of a module runs; its weights may be elsewhere."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


def has_several_devices(module: nn.Module) -> bool:
    """Return whether the weights are on more than one device."""
    return len({weight.device for weight in module.parameters()}) > 1


def is_offloaded(module: nn.Module) -> bool:
    """Return whether the module's own weights, not those of parts, are offloaded between calls."""
    hook = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False)) and bool(module._parameters)


def shallow_copy(module: Any) -> Any:
    """Return a copy with the same weights, whose submodules and attributes can be replaced.

    Parameters and buffers are in the same dict objects as the original's, so moving or loading the
    original also moves or loads the copy. Hooks work on the copy; `torch.nn.Module.compile` has to
    be called again.
    """
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    # A compiled call is bound to the original.
    vars(twin).pop("_compiled_call_impl", None)
    # Hooks bind these to the original; bind them to the copy.
    for name in ("forward", "_old_forward"):
        if name in vars(twin):
            vars(twin)[name] = _bound_to(twin, vars(twin)[name], module)
    return twin


def _bound_to(twin: Any, call: Any, module: Any) -> Any:
    if isinstance(call, functools.partial):
        args = (twin if argument is module else argument for argument in call.args)
        return functools.partial(call.func, *args, **call.keywords)
    if getattr(call, "__self__", None) is module:
        return types.MethodType(call.__func__, twin)
    return call
