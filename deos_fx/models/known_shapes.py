"""What operations make of tensors without values, remembered.

Many operations on the meta device are Python code of torch, and layers of one kind ask for the same
ones again: a reference kernel of linear attention makes hundreds for each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deos_fx.recent import Recent

__all__ = ["META", "on_meta", "tensors_in", "without_values"]

META = torch.device("meta")

# Tags of operations whose results have shapes that depend on values.
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

_Like = tuple[torch.Size, tuple[int, ...], torch.dtype]
# Operation and operands -> what is known of its result: one tensor, or several.
_KNOWN: Recent[Hashable, _Like | list[_Like]] = Recent(4096)


def on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the meta device, or make a result like the one that it had before.

    Args:
        func: An operation of torch, as a dispatch mode gets it.
        args: Its arguments; of tensors, only shapes, strides and types count.
        kwargs: Its keyword arguments.
    """
    key = None
    if _makes_something_new(func):
        key = func, _key(args), _key(tuple(kwargs.items()))
        known = _KNOWN.get(key)
        if known is not None:
            return tuple(map(_made, known)) if isinstance(known, list) else _made(known)
    args, kwargs = pytree.tree_map_only(Tensor, without_values, (args, dict(kwargs)))
    result = func(*args, **kwargs)
    if key is not None and _is_plain(result):
        _KNOWN.put(key, _like(result))
    elif key is not None and type(result) is tuple and all(map(_is_plain, result)):
        _KNOWN.put(key, list(map(_like, result)))
    return result


def tensors_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operation, also those in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (one for one in value if isinstance(one, Tensor))


def without_values(tensor: Tensor) -> Tensor:
    """Return a tensor on meta with the shape, strides and type of this one."""
    return tensor if tensor.is_meta else _made(_like(tensor))


@functools.cache
def _makes_something_new(func: Any) -> bool:
    """Return whether an operation changes no operand, gives no view and reads no values."""
    if not isinstance(func, torch._ops.OpOverload):
        # Case: an operator that takes functions.
        return False
    schema = func._schema
    views = any(result.alias_info is not None for result in schema.returns)
    return not schema.is_mutable and not views and _BY_VALUE.isdisjoint(func.tags)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    # With its type: 1, 1.0 and True are equal, and make results of other types.
    return type(value), value


def _is_plain(result: object) -> bool:
    """Return whether shape, strides and type say everything of a result."""
    return isinstance(result, Tensor) and result.is_meta and result.layout is torch.strided


def _like(tensor: Tensor) -> _Like:
    return tensor.shape, tensor.stride(), tensor.dtype


def _made(like: _Like) -> Tensor:
    shape, stride, dtype = like
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)
