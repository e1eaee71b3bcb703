"""Replacements of other packages' functions in the thread that captures.

A replacement is installed for the whole process, but it does something else than the original only
in a thread whose `TRACER` is set. Other threads may go on running their models.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.utils.import_utils import torch_compilable_check

from deos_fx.errors import CaptureError
from deos_fx.models.families import ENCODERS, SHORTCUTS
from deos_fx.models.sharded import class_of
from deos_fx.passes.capture.proxy import has_proxy
from deos_fx.passes.capture.tracer import Tracer
from deos_fx.replaced import Replacement

__all__ = ["TRACER", "replacements_of"]

# Functions of torch that are written in C. Not all of them dispatch on proxies (factories that take
# sizes do not), so all are wrapped while tracing. `linear` does dispatch and must stay itself:
# tensor subclasses of quantisation ask whether they are called from this very function.
_BUILTINS = tuple(
    (namespace, name)
    for namespace in (torch, functional)
    for name, function in vars(namespace).items()
    if isinstance(function, types.BuiltinFunctionType)
    and function is not functional.linear
    # `has_torch_function*` asks about a value's type, not about the input: never record it.
    and not name.startswith(("_", "has_torch_function"))
)


# Factories whose results depend on sizes only may be recorded; a tensor built from data is refused.
_FACTORIES = {"arange", "eye", "full", "linspace", "ones", "zeros"}


# Functions that join tensors along an axis.
_JOINS = {"cat", "concat", "concatenate"}

_OWN_MASK = "_prepare_decoder_attention_mask"

# The tracer that records this thread; None while the thread does not capture.
TRACER: ContextVar[Tracer | None] = ContextVar("deos_fx_tracer", default=None)


def replacements_of(model: PreTrainedModel, opaque_encoder: bool) -> Iterator[Replacement]:
    """Yield the functions that do not dispatch on proxies, with what replaces them.

    Args:
        model: The model to capture.
        opaque_encoder: Whether its image encoder is recorded as one node.

    Yields:
        Owner and name of each function, and how to make its replacement from the original.
    """
    core: Any = type(model.base_model)
    for method in ENCODERS if opaque_encoder else ():
        if hasattr(core, method):
            yield core, method, _when_traced(_encode)
    # Lengths of the cache, from which glue code makes masks and positions.
    for name in ("get_seq_length", "get_mask_sizes"):
        yield Cache, name, _when_traced(_length)
    # Calls of modules, and parameters that glue code reads.
    yield nn.Module, "__call__", _when_traced(_call)
    yield nn.Module, "__getattr__", _when_traced(_getattr)
    # Functions on proxies.
    for owner, name in _BUILTINS:
        yield owner, name, _when_traced(_function)
    # Shortcuts, which model classes define themselves.
    for kind in {class_of(module) for module in model.modules()}:
        for name in SHORTCUTS.keys() & vars(kind).keys():
            yield kind, name, _when_traced(_first_arguments)
    # Methods that make masks, under the name that transformers gave them before it had functions.
    for kind in {class_of(module) for module in model.modules()}:
        if _OWN_MASK in vars(kind):
            yield kind, _OWN_MASK, _when_traced(_own_mask)
    # Mask functions and checks. A model file imports them by name, so they are replaced there, in
    # the namespace of every file that a module comes from.
    for namespace in {sys.modules[class_of(part).__module__] for part in model.modules()}:
        for name, value in list(vars(namespace).items()):
            if _makes_masks(name, value):
                yield namespace, name, _when_traced(_mask)
            elif value is torch_compilable_check:
                # It compares tensors in Python, which would leave guards; the inputs were checked
                # before the capture.
                yield namespace, name, _when_traced(_no_check)


def _makes_masks(name: str, value: Any) -> bool:
    """Return whether a value is a function, of transformers or of a model file, that makes masks.

    Mask functions look at values and at the attention implementation, so each becomes one opaque
    node.
    """
    named = name.startswith("create_") and "mask" in name and inspect.isfunction(value)
    return named and "config" in inspect.signature(value).parameters


_Traced = Callable[[Tracer, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@functools.cache
def _when_traced(traced: _Traced) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a replacement that calls `traced` in a thread that captures, else the original."""

    # Every capture replaces the same seven hundred functions.
    @functools.cache
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            tracer = TRACER.get()
            if tracer is None:
                return original(*args, **kwargs)
            return traced(tracer, original, args, kwargs)

        return function

    return make


def _call(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record the call of a leaf module; any other module is run, and its parts are recorded."""
    module, *rest = args
    path = tracer.module_paths.get(id(module))
    if path is None or not has_proxy((rest, kwargs)) or not tracer.is_leaf_module(module, path):
        return original(*args, **kwargs)
    return tracer.call_leaf(module, tuple(rest), kwargs)


def _first_arguments(
    tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return the arguments of one of the `SHORTCUTS` untouched, in place of calling it."""
    return args[1 : 1 + SHORTCUTS[original.__name__]]


def _length(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let glue code read the length of a cache, from which it makes masks and positions.

    A block may ask how much its own layer holds, which is right where tokens were dropped, too.

    Raises:
        CaptureError: If a block reads the length of the text: it would take it for its own.
    """
    # args has the cache and, if a block asks for a layer of its choice, the number of that.
    whole = original.__name__ == "get_seq_length" and len(args) + len(kwargs) == 1
    if tracer.block and whole:
        raise CaptureError(
            f"{tracer.block.name} counts positions itself, by the length of its cache, which is "
            "shorter where tokens were dropped. Use a model that gives its layers positions."
        )
    return original(*args, **kwargs)


def _encode(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record an opaque image encoder as one node."""
    core, *rest = args
    if has_proxy((rest, kwargs)):
        return tracer.call_encoder(original, core, tuple(rest), kwargs)
    return original(*args, **kwargs)


def _getattr(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record parameters and buffers that glue code reads as get_attr nodes."""
    module, name = args
    value = original(module, name)
    path = tracer.module_paths.get(id(module))
    # Inside a running leaf, reading a parameter is no operation of the graph.
    if tracer.running or path is None or not isinstance(value, torch.Tensor):
        return value
    return tracer.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})


def _function(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a function of torch that is called on proxies, or makes a tensor of sizes."""
    # Factories are recorded even without a proxy among their arguments: their sizes may be numbers
    # that were read from one.
    if tracer.in_front is not None and not tracer.running and original.__name__ in _JOINS:
        joined = tracer.in_front.joined(*args, **kwargs)
        if joined is not None:
            return joined
    makes = original.__name__ in _FACTORIES
    if not tracer.running and (makes or has_proxy((args, kwargs))):
        return tracer.create_proxy("call_function", original, args, kwargs)
    return original(*args, **kwargs)


def _mask(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a mask function as one node."""
    if tracer.running:
        # A mask function may call another one; only the outermost is recorded.
        return original(*args, **kwargs)
    named = inspect.signature(original).bind(*args, **kwargs).arguments
    return tracer.call_mask_function(original, named)


def _own_mask(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a method that makes a mask as one node."""
    module, *_ = args
    named = inspect.signature(original).bind(*args, **kwargs).arguments

    def create_own_mask(config: Any, **given: Any) -> Any:
        return original(module, **given)

    del named["self"]
    return tracer.call_mask_function(create_own_mask, {**named, "config": module.config}, own=True)


def _no_check(tracer: Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Leave a check out."""
