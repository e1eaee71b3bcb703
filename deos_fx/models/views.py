"""Views of modules: copies that share the weights and in which parts can be replaced.

Two kinds of modules need care:

1. Modules with hooks of accelerate, which runs a model on several devices or from the disk. A hook
   replaces the module's forward by one that is bound to this very module and brings weights and
   arguments to the device where the module runs.
2. Quantised layers, of any library. Their weights are codes, not plain numbers: tensor subclasses
   that compute for themselves, or packed integers next to their scales. Only the layer's own code
   knows what they mean, so nothing else reads them. Such layers are recognised by the types of
   their tensors, and a linear one by its two sizes.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

__all__ = [
    "AnyLinear",
    "execution_device",
    "has_codes",
    "has_several_devices",
    "is_offloaded",
    "linear_sizes",
    "shallow_copy",
    "with_forward",
    "with_layers",
    "with_parts",
]


# *** hooks ***


def execution_device(module: nn.Module) -> torch.device:
    """Return the device where the first part of a module runs; its weights may be elsewhere."""
    # A hook knows better than the weights, which it may keep on the CPU or on the disk.
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


def has_several_devices(module: nn.Module) -> bool:
    """Return whether the weights are on more than one device."""
    return len({weight.device for weight in module.parameters()}) > 1


def is_offloaded(module: nn.Module) -> bool:
    """Return whether the module's own weights, not its parts', leave the device between calls."""
    hook = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False)) and bool(module._parameters)


def shallow_copy(module: Any) -> Any:
    """Return a copy with the same weights, whose submodules and attributes can be replaced.

    The copy holds the very dicts of parameters and buffers that the original holds, so moving or
    loading the original also moves or loads the copy. Hooks work on the copy. A call of
    `torch.nn.Module.compile` has to be repeated.
    """
    # Not copy.copy: FSDP gives the classes of modules a __new__ that makes one of the former class.
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
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
        # Case: accelerate's forward, a partial whose first argument is the module.
        args = (twin if argument is module else argument for argument in call.args)
        return functools.partial(call.func, *args, **call.keywords)
    if getattr(call, "__self__", None) is module:
        # Case: a bound method.
        return types.MethodType(call.__func__, twin)
    return call


# *** quantised layers ***


# Types of numbers, positions or flags; tensors of other types are codes.
_NUMBERS = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.int64,
    torch.bool,
}
_PLAIN = {Tensor, nn.Parameter, FakeTensor}


class AnyLinear(nn.Linear):
    """A linear map that takes inputs of any precision, as quantised layers do."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply it in the precision of the input.

        Args:
            input: [..., in_features].

        Returns:
            [..., out_features].
        """
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


def has_codes(module: nn.Module) -> bool:
    """Return whether tensors of the module itself, not of its parts, are not plain numbers."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(map(_is_code, tensors))


def _is_code(tensor: Tensor | None) -> bool:
    # A shard of numbers is no code. By name, because importing DTensor takes long.
    if tensor is None or type(tensor).__module__.startswith("torch.distributed.tensor"):
        return False
    return type(tensor) not in _PLAIN or tensor.dtype not in _NUMBERS


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output features of a linear layer of any kind; None for other modules.

    An adapter does not count as a layer; the layers that it wraps and adds do. Nor does a layer
    that computes something else with plain weights, such as a router.
    """
    forward = getattr(type(module), "forward", None)
    plain = forward in (nn.Linear.forward, AnyLinear.forward)
    if isinstance(module, nn.Linear) and not plain and not has_codes(module):
        return None
    sizes: Any = tuple(getattr(module, name, None) for name in ("in_features", "out_features"))
    # Adapters repeat the sizes of the layer that they wrap, which is one of their children.
    known = all(isinstance(size, int) for size in sizes) and not any(module.children())
    return sizes if known else None


def with_layers(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a view of a module in which layers with codes are replaced.

    Args:
        module: The module, which is left as it is.
        replace: Returns the replacement of such a layer.

    Returns:
        The module itself if it has none; otherwise a copy with the same weights and hooks.
    """
    layers = [part for part in module.modules() if has_codes(part)]
    return with_parts(module, {part: replace(part) for part in layers}) if layers else module


def with_parts(module: nn.Module, parts: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a view of a module, with the same weights and hooks, in which parts are replaced.

    Args:
        module: The module, which is left as it is.
        parts: Part -> its replacement.
    """
    if module in parts:
        return parts[module]
    # The copy is shallow, so every module on the way to a replaced part needs one of its own.
    view = _with_own_hooks(module)
    for name, part in module._modules.items():
        view._modules[name] = None if part is None else with_parts(part, parts)
    return view


def with_forward(module: nn.Module, around: Callable[..., Any]) -> nn.Module:
    """Return a view of a module with another forward, that still is an instance of its class.

    Args:
        module: The module, which is left as it is; everything else is shared with it.
        around: The other forward, called with the module's own one and then its arguments.
    """
    kind: Any = type(module)
    view = _with_own_hooks(module)
    # accelerate's hooks are a forward of the instance, which would hide that of the view's class.
    # The view has to call it as well.
    hooked = vars(view).pop("forward", None)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(hooked or functools.partial(kind.forward, self), *args, **kwargs)

    view.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return view


def _with_own_hooks(module: nn.Module) -> Any:
    """Return a shallow copy that has hooks of its own.

    Models add hooks to their parts at the first call; those added to a view stay in the view.
    """
    view = shallow_copy(module)
    hooks = {name: copy.copy(value) for name, value in vars(view).items() if "hooks" in name}
    vars(view).update(hooks)
    return view
