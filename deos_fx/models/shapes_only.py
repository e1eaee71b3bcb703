"""Run a model without its weights: values where inputs decide them, and otherwise only shapes.

The code of a model reads some values into Python: sizes of images, token ids, whether anything is
padded. These follow from the inputs alone. What its weights enter, its code takes as it comes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface

from deos_fx.models.layers import AnyLinear, linear_sizes, with_layers
from deos_fx.models.views import execution_device
from deos_fx.replaced import replaced

__all__ = [
    "OnZeros",
    "ShapesOnly",
    "on_shapes",
    "plain_attention",
    "shaped",
    "without_missing_weights",
]

META = torch.device("meta")

# What the names of attention implementations begin with.
_KERNELS = ("flash", "flex", "paged", "kernels")


class ShapesOnly(TorchDispatchMode):
    """While active, the result of an operation has values only if all its operands have.

    Parameters count as having none. Everything else is on the meta device, and stays there if it is
    to be moved. What is moved there, or counted there in integers (positions), keeps its values on
    the CPU. Attention is sdpa, whatever was chosen: other kernels want numbers.
    """

    def __enter__(self) -> Any:
        plain = contextlib.ExitStack()
        plain.enter_context(plain_attention(masks=("eager",)))
        self._plain = [*getattr(self, "_plain", ()), plain]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._plain.pop().close()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(map(_has_no_values, operands)):
            if func is torch.ops.aten.index.Tensor:
                # How many rows a mask selects, its values say.
                return func(_without_values(args[0]), args[1])
            args, kwargs = pytree.tree_map_only(torch.Tensor, _without_values, (args, kwargs))
            return func(*args, **(kwargs | {"device": META} if "device" in kwargs else kwargs))
        result = func(*args, **kwargs)
        if kwargs.get("device") == META and not result.is_floating_point():
            if operands or result.dtype == torch.int64:
                return func(*args, **{**kwargs, "device": "cpu"})
        return result


# What the names begin with of implementations that are sdpa, in this thread, and of masks.
_PLAIN: ContextVar[tuple[str, ...]] = ContextVar("deos_fx_plain_attention", default=())
_PLAIN_MASKS: ContextVar[tuple[str, ...]] = ContextVar("deos_fx_plain_masks", default=())


@contextlib.contextmanager
def plain_attention(masks: tuple[str, ...] = ()) -> Iterator[None]:
    """Run every attention implementation that needs a kernel of its own as sdpa, in this thread.

    Args:
        masks: Further implementations whose masks are to be those of sdpa.
    """
    known: dict[str, Any] = AttentionInterface._global_mapping
    made: dict[str, Any] = AttentionMaskInterface._global_mapping
    prefixes = (*_KERNELS, *masks)
    replacements = [
        *((known, name, _plain(known, name, _PLAIN)) for name in _beginning(known, _KERNELS)),
        *((made, name, _plain(made, name, _PLAIN_MASKS)) for name in _beginning(made, prefixes)),
    ]
    with replaced(replacements):
        tokens = _PLAIN.set(_KERNELS), _PLAIN_MASKS.set((*_PLAIN_MASKS.get(), *prefixes))
        try:
            yield
        finally:
            _PLAIN.reset(tokens[0])
            _PLAIN_MASKS.reset(tokens[1])


def _beginning(table: dict[str, Any], prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in list(table) if name.startswith(prefixes)]


def _plain(
    table: dict[str, Any], name: str, plain: ContextVar[tuple[str, ...]]
) -> Callable[[Any], Any]:
    """What makes an entry of a table that is sdpa's where the thread wants it plain."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            chosen = table["sdpa"] if name.startswith(plain.get()) else original
            return chosen(*args, **kwargs)

        return function

    return make


def without_missing_weights(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What to run a model in: nothing special, but `ShapesOnly` if it is on the meta device."""
    return ShapesOnly() if execution_device(model) == META else contextlib.nullcontext()


@contextlib.contextmanager
def on_shapes(module: nn.Module) -> Iterator[Any]:
    """`ShapesOnly`, with a view of a module that can be run in it, whatever its weights are."""
    with ShapesOnly():
        yield shaped(module)


def shaped(module: nn.Module) -> nn.Module:
    """A view of a module in which no layer computes with codes; it is for `ShapesOnly`."""
    return with_layers(module, _stand_in)


def _stand_in(layer: nn.Module) -> nn.Module:
    sizes = linear_sizes(layer)
    return OnZeros(layer) if sizes is None else AnyLinear(*sizes, bias=False, device=META)


class OnZeros(nn.Module):
    """A layer whose sizes only its own code knows: it is run, on zeros, for the shapes.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on numbers, with no mode active."""
        return self.layer(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes of what the layer makes of shapes; gradients say that the one is of the other."""
        leaves = pytree.tree_leaves((args, kwargs))
        sources = [x.sum() for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        device = execution_device(self.layer)

        def values(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x

        def shape(x: torch.Tensor) -> torch.Tensor:
            empty = _without_values(x)
            return sum(sources, empty) if x.is_floating_point() else empty

        with _disable_current_modes(), torch.no_grad():
            args, kwargs = pytree.tree_map_only(torch.Tensor, values, (args, kwargs))
            result = self.run(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, shape, result)


def _has_no_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, nn.Parameter)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
