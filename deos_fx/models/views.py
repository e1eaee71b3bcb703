"""Modules that accelerate has hooked, to run a model on several devices or from the disk.

A hook replaces a module's forward by one that is bound to this very module: it brings weights and
arguments to where the module runs.
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
    """Where the first part of a module runs; that need not be where its weights are meanwhile."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


def has_several_devices(module: nn.Module) -> bool:
    """Whether not all weights are in one place."""
    return len({weight.device for weight in module.parameters()}) > 1


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of the module itself, not of its parts, are elsewhere between its calls."""
    hook = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False)) and bool(module._parameters)


def shallow_copy(module: Any) -> Any:
    """Another module with the same weights, whose submodules and attributes can be replaced.

    Parameters and buffers are the same dict objects as the original's, so moving or loading the
    original moves the copy. Hooks work on the copy; `torch.nn.Module.compile` has to be called
    again.
    """
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    vars(twin).pop("_compiled_call_impl", None)
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
