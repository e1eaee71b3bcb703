"""Proxies of the values of a run: they record what is done with them, and know their values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx.errors import CaptureError
from deos_fx.passes.capture.key_angles import POSITIONS
from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.notes import annotate

__all__ = ["STRUCTURAL_TYPES", "ValueProxy", "has_proxy", "with_features"]

STRUCTURAL_TYPES = (str, torch.dtype, torch.device, torch.layout, type(None))
"""Results of these types describe the structure of a run and not its data: they are no proxies."""

# The largest number of values of a tensor that code may read into Python, such as sizes of images.
_MOST_READ = 64

# During a capture torch.unbind is a replacement, which must not become the target of a node.
_UNBIND = torch.unbind


def with_features(x: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """Return a copy of `x` [B, N, ...] with `value` at `key`.

    A graph has values and no variables, so this is how ``x[key] = value`` is recorded.
    """
    x = x.clone()
    x[key] = value
    return x


class ValueProxy(fx.Proxy):
    """An fx proxy that knows the value of its node in the example run."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # transformers asks isinstance(x, torch.Tensor) in many places.
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        if self.value is None:
            # Case: a mask that code computes with, though nothing is padded in the example run.
            tracer: Any = self.tracer
            self.value = tracer.mask_of(self.node)
        attribute = getattr(self.value, name)
        if callable(attribute):
            # Case: a method. Its call is recorded.
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        if isinstance(attribute, (*STRUCTURAL_TYPES, bool)):
            # Case: a dtype, a device, a flag such as is_cuda: part of the structure.
            return attribute
        # Case: data, such as a shape.
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        """Note that the model's code keeps positions of keys; see key_angles.py.

        Raises:
            CaptureError: If it writes anything else into an object, which would not be recorded.
        """
        if name in ("node", "tracer", "value"):
            super().__setattr__(name, value)
        elif name == POSITIONS:
            vars(self.tracer)["keeps_positions"] = True
        else:
            raise CaptureError(
                f"The model's code sets {name} of a {type(self.value).__name__}, which a graph "
                "cannot follow. Use a model whose code does not."
            )

    def __getitem__(self, key: Any) -> Any:
        tracer: Any = self.tracer
        if tracer.in_front is not None:
            key = tracer.in_front.whole(self.value, key)
        parts = tracer.mask_parts.get(self.node)
        if parts is None:
            # Case: anything but a dict of masks by kind of layer.
            item = tracer.create_proxy("call_function", operator.getitem, (self, key), {})
            mask = key[0] if isinstance(key, tuple) and key else key
            masked = isinstance(mask, ValueProxy) and mask.dtype == torch.bool
            if masked and self.value.dtype != torch.bool:
                # For fold_masked_add: the number of axes of a row that the mask selects. Flags have
                # no content, so reads of them are not marked.
                annotate(item.node, masked=self.value.ndim - mask.value.ndim)
            return item
        # Case: the mask of one kind of layer, recorded also where it is None in the example run:
        # the next batch may be padded.
        if key not in parts:
            node = tracer.create_node("call_function", operator.getitem, (self.node, key), {})
            parts[key] = ValueProxy(node, tracer, tracer.values[node])
        return parts[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Record an assignment as a new value, which this proxy stands for from here on.

        Rows that a mask selects can be assigned, or the same features of all rows.

        Raises:
            CaptureError: If another part of the tensor is assigned.
        """
        # `rest` is what follows the mask in x[mask, :, ...].
        mask, *rest = key if isinstance(key, tuple) else (key,)
        tracer: Any = self.tracer
        masked = isinstance(mask, ValueProxy) and mask.dtype == torch.bool
        own: Any = self
        # x[:, :, ...] = value: the same features of every token.
        of_features = isinstance(key, tuple) and key[:2] == (slice(None),) * 2
        # A constant written into flags or counts, at a place that is a constant as well.
        counted = not own.dtype.is_floating_point and not has_proxy(value)
        if (of_features or counted) and not has_proxy(key):
            # Case: a place that no tensor decides.
            changed = tracer.create_proxy("call_function", with_features, (self, key, value), {})
            self.node, self.value = changed.node, changed.value
            return
        if not masked or any(part != slice(None) for part in rest):
            raise CaptureError(
                "The model's code assigns to a part of a tensor that no mask selects, which cannot "
                "be captured. Use a model that makes its inputs in another way."
            )
        # Case: rows that a mask selects. The mask gets the missing axes to broadcast.
        trailing = self.value.ndim - mask.value.ndim
        for _ in range(trailing):
            mask = mask[..., None]
        if isinstance(value, ValueProxy) and value.dtype != own.dtype:
            value = value.to(own.dtype)
        # One value for each selected row, or the same for all of them.
        if isinstance(value, ValueProxy) and value.value.ndim > trailing:
            changed = own.masked_scatter(mask, value)
        else:
            changed = torch.where(mask, value, own)
        self.node, self.value = changed.node, changed.value

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, torch.Tensor):
            # Case: a tensor. Its leading axis is unrolled; fold_unstack undoes this where it can.
            parts: Any = self.tracer.create_proxy("call_function", _UNBIND, (self,), {})
            annotate(parts.node, unrolled=len(self.value))
            return iter(parts[i] for i in range(len(self.value)))
        # Case: a tuple or a list, such as a shape.
        items: Any = self
        return iter(items[i] for i in range(len(self.value)))

    def __len__(self) -> int:
        length: Any = self.tracer.create_proxy("call_function", len, (self,), {})
        # Converting the length to int leaves a guard.
        return int(length)

    def __bool__(self) -> bool:
        # A guard on the truth of a value, not on the value: any other with the same truth passes.
        itself: Any = self
        if isinstance(self.value, torch.Tensor) and self.value.dtype != torch.bool:
            itself = itself != 0
        elif not isinstance(self.value, (torch.Tensor, bool)):
            itself = self.tracer.create_proxy("call_function", operator.truth, (self,), {})
        return bool(itself._specialise(bool))

    def __int__(self) -> int:
        return self._specialise(int)

    def __index__(self) -> int:
        return self._specialise(operator.index)

    def __float__(self) -> float:
        return self._specialise(float)

    def tolist(self) -> Any:
        """Read all values of a small table into Python, each with a guard.

        Raises:
            CaptureError: If there are many, so that hardly any other input would have the same.
        """
        if self.value.ndim == 0:
            return self._specialise(torch.Tensor.item)
        if self.value.numel() > _MOST_READ:
            raise CaptureError(
                f"The model's code reads a tensor of shape {tuple(self.value.shape)} into Python, "
                "which cannot be captured. Use a model whose code does not."
            )
        return [part.tolist() for part in self]

    def __format__(self, spec: str) -> str:
        # Messages and names: what they say is no data, so nothing is recorded.
        return format(self.value, spec)

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __contains__(self, key: object) -> bool:
        return key in self.value

    def __hash__(self) -> int:
        # A number may be looked up in a set or a dict of numbers, which reads its value.
        return hash(self._specialise(int)) if isinstance(self.value, int) else id(self)

    def _specialise(self, convert: Callable[[Any], Any]) -> Any:
        """Read the value into Python, and guard that it is the same at every later run."""
        value = convert(self.value)
        # Not a proxy, which there is none of for None.
        guard = self.tracer.create_node("call_function", check_guard, (self.node, value), {})
        annotate(guard, reads=isinstance(self.value, torch.Tensor))
        return value


def has_proxy(arguments: object) -> bool:
    """Return whether there is a proxy anywhere in nested arguments."""
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(arguments))
