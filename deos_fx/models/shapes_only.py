"""Run a model without its weights: with values where the inputs alone decide them, else shapes.

The code of a model reads some values into Python: sizes of images, token ids, whether anything is
padded. All of these follow from the inputs, so they are computed. Model code never inspects values
that depend on weights, so of these only the shapes are computed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from deos_fx.models.blocks import puts_in_front
from deos_fx.models.encoding import encoded_by
from deos_fx.models.known_shapes import META, on_meta, tensors_in, without_values
from deos_fx.models.sharded import without_shards
from deos_fx.models.views import AnyLinear, execution_device, linear_sizes, with_layers
from deos_fx.replaced import replaced

__all__ = [
    "ListedNumbers",
    "OnZeros",
    "ShapesOnly",
    "count_visual_tokens",
    "on_shapes",
    "plain_attention",
    "shaped",
    "without_missing_weights",
]

# By their own names: while a model is captured, other functions have their places in torch.
_ATTENTION = F.scaled_dot_product_attention
_LISTING = (torch.tensor, torch.as_tensor)

# Prefixes of the names of attention implementations that need a kernel of their own.
_KERNELS = ("flash", "flex", "paged", "kernels")


class ShapesOnly(TorchDispatchMode):
    """A mode in which the result of an operation has values only if all its operands have.

    1. A parameter, or a tensor on meta, has no values. What is computed from it is on meta, and
       stays there even if code moves it to another device.
    2. Everything else has values. Model code asks for some of it on the device of the weights,
       which may be meta: integers and flags that it moves there, and positions (int64) that it
       creates there. These are computed on the CPU, so that code can read them.
    3. Implementations of attention with a kernel of their own run as sdpa, because kernels need
       numbers.
    """

    def __enter__(self) -> Any:
        # One mode may be entered several times, so the contexts make a stack.
        plain = contextlib.ExitStack()
        plain.enter_context(plain_attention(masks=("eager",)))
        plain.enter_context(_Functions())
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
        operands = list(tensors_in(args, kwargs))
        if any(map(_has_no_values, operands)):
            # Case 1: the result depends on values that are missing, so only its shape is computed.
            if func is torch.ops.aten.index.Tensor:
                # The values of a mask say how many rows it selects, so the index keeps its values.
                return func(without_values(args[0]), _places(args[1]))
            # A move to another device would ask meta for numbers.
            return on_meta(func, args, kwargs | {"device": META} if "device" in kwargs else kwargs)
        result = func(*args, **kwargs)
        if kwargs.get("device") == META and not result.is_floating_point():
            # Case 2: integers or flags that were moved to meta (they have operands), or positions
            # that were created there (they have none). The first result has no values: run again.
            if operands or result.dtype == torch.int64:
                return func(*args, **{**kwargs, "device": "cpu"})
        return result


def _places(indices: Any) -> list[torch.Tensor | None]:
    """Return the indices, with all places instead of a mask that has no values."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and index.is_meta
        every = torch.empty(index.numel(), dtype=torch.int64, device=META) if mask else index
        found.extend([every] * (index.ndim if mask else 1))
    return found


# Prefixes of the implementations, and of the masks, that run as sdpa in this thread. Replaced table
# entries are seen by every thread; these variables say in which of them they act.
_PLAIN: ContextVar[tuple[str, ...]] = ContextVar("deos_fx_plain_attention", default=())
_PLAIN_MASKS: ContextVar[tuple[str, ...]] = ContextVar("deos_fx_plain_masks", default=())


@contextlib.contextmanager
def plain_attention(masks: tuple[str, ...] = ()) -> Iterator[None]:
    """Run every attention implementation that needs a kernel of its own as sdpa, in this thread.

    Args:
        masks: Prefixes of further implementations whose masks are made as for sdpa.
    """
    known: dict[str, Any] = AttentionInterface._global_mapping
    made: dict[str, Any] = AttentionMaskInterface._global_mapping
    prefixes = (*_KERNELS, *masks)
    replacements = [
        *((known, name, _plain(known, name, _PLAIN)) for name in _beginning(known, _KERNELS)),
        *((made, name, _plain(made, name, _PLAIN_MASKS)) for name in _beginning(made, prefixes)),
    ]
    with replaced(replacements):
        # Masks add up when contexts are nested; implementations are always the same.
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
    """Return a maker of table entries that call sdpa's entry in threads that want plain ones."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            chosen = table["sdpa"] if name.startswith(plain.get()) else original
            return chosen(*args, **kwargs)

        return function

    return make


def without_missing_weights(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context to run a model in: `ShapesOnly` on the meta device, otherwise none."""
    return ShapesOnly() if execution_device(model) == META else contextlib.nullcontext()


@contextlib.contextmanager
def on_shapes(module: nn.Module) -> Iterator[Any]:
    """Enter `ShapesOnly` with a view of a module that runs in it, whatever its weights are."""
    with ShapesOnly():
        yield shaped(module)


def count_visual_tokens(model: PreTrainedModel, image: Mapping[str, torch.Tensor]) -> int:
    """Count the visual tokens of an image by running the encoder on shapes, without arithmetic.

    Args:
        model: A model that reads images.
        image: The inputs that the image comes in.

    Returns:
        Their number; 0 if the encoder does not take the image in this form.
    """
    if not (hasattr(model.base_model, "get_image_features") or puts_in_front(model)):
        # Case: what is encoded is known only as a part of the prompt.
        return 0
    try:
        with on_shapes(model.base_model) as core, torch.no_grad():
            features = encoded_by(core, "get_image_features", image)
    # How an encoder fails on inputs of another form is up to the code of its family.
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError):
        return 0
    parts = [features] if isinstance(features, torch.Tensor) else features
    return sum(math.prod(part.shape[:-1]) for part in parts)


def shaped(module: nn.Module) -> nn.Module:
    """Return a view of a module for `ShapesOnly`, in which no layer computes with codes."""
    return with_layers(without_shards(module), _stand_in)


def _stand_in(layer: nn.Module) -> nn.Module:
    # A linear layer is known by its two sizes. Any other layer has to run to tell its shapes.
    sizes = linear_sizes(layer)
    return OnZeros(layer) if sizes is None else AnyLinear(*sizes, bias=False, device=META)


class OnZeros(nn.Module):
    """A layer whose sizes only its own code knows: it runs on zeros to find the shapes.

    Args:
        layer: The layer to run.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on numbers; no dispatch mode is active."""
        return self.layer(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return shapes of the results; gradients connect them to arguments that require any."""
        # Whoever asks which outputs depend on which weights follows the gradient through this layer
        # too, so every result gets a zero that depends on the arguments.
        leaves = pytree.tree_leaves((args, kwargs))
        sources = [x.sum() for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        device = execution_device(self.layer)

        def values(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x

        def shape(x: torch.Tensor) -> torch.Tensor:
            empty = without_values(x)
            return sum(sources, empty) if x.is_floating_point() else empty

        # Inside, the kernel needs real numbers: no mode may turn them into shapes.
        with _disable_current_modes(), torch.no_grad():
            args, kwargs = pytree.tree_map_only(torch.Tensor, values, (args, kwargs))
            result = self.run(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, shape, result)


class ListedNumbers(TorchFunctionMode):
    """Creates tensors of whole numbers that code lists with their values, wherever it wants them.

    On meta, such a tensor does not reach a dispatch mode.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func not in _LISTING or device in (None, "cpu"):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        keeps = torch.device(device) == META and not made.is_floating_point()
        return made if keeps else func(*args, **kwargs)


class _Functions(ListedNumbers):
    """The same, and attention is one shape.

    As operations it is twenty, each for Python, and an encoder with windows attends once for each
    window of each block.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _ATTENTION and len(args) >= 3 and _is_one_shape(*args[:3]):
            return _Attention.apply(*args[:3])
        return super().__torch_function__(func, types, args, kwargs)


class _Attention(torch.autograd.Function):
    """Attention as a shape that depends on queries, keys and values: gradients are asked for."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Return [..., Q, d] on meta."""
        ctx.save_for_backward(query, key, value)
        return query.new_empty((*query.shape[:-1], value.shape[-1]), device=META)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a gradient for each, whose values have no meaning."""
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


def _is_one_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether attention is known by its shape: no values, and no heads that are shared."""
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    return alike and any(x.is_meta for x in (query, key, value))


def _has_no_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, nn.Parameter)
