"""Quantised layers, of any library: their weights are not plain numbers.

Only the layer's own code knows what such weights mean (tensor subclasses that compute for
themselves, packed integers next to their scales), so nothing else reads them. The layers are
recognised by the types of their tensors, and a linear one by its two sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from deos_fx.models.views import shallow_copy

__all__ = ["AnyLinear", "has_codes", "linear_sizes", "with_layers"]

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
    return tensor is not None and (type(tensor) not in _PLAIN or tensor.dtype not in _NUMBERS)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the input and output features of a linear layer of any kind; None for other modules.

    An adapter does not count as a layer; the layers that it wraps and adds do.
    """
    sizes: Any = tuple(getattr(module, name, None) for name in ("in_features", "out_features"))
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
    return _view(module, replace) if any(map(has_codes, module.modules())) else module


def _view(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if has_codes(module):
        return replace(module)
    view: nn.Module = shallow_copy(module)
    # Models add hooks to their parts at the first call; those added to the view stay in the view.
    hooks = {name: copy.copy(value) for name, value in vars(view).items() if "hooks" in name}
    vars(view).update(hooks)
    for name, part in module._modules.items():
        view._modules[name] = None if part is None else _view(part, replace)
    return view
