"""Capture: run an unmodified model once and record the run as a torch.fx graph.

The tracer's proxies carry the concrete value of the example run. Control flow and ``isinstance``
checks look at the value, so any model code works; every operation on a proxy is recorded. One
``call_module`` node stands for a transformer block, an embedding, a norm, the projector or the
head; the glue between them is plain fx nodes. Blocks keep their kernels and their weights: nothing
is copied.

What the example run decides for good (a branch on a tensor or on a length) is recorded as a
*guard* node that is checked at every later run, so a specialisation is never silent.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel, masking_utils
from transformers.cache_utils import KVSharingDict
from transformers.utils.import_utils import torch_compilable_check

from deos_fx.errors import CaptureError, GuardError
from deos_fx.models.encoders import ENCODERS
from deos_fx.models.families import SHORTCUTS
from deos_fx.models.shapes_only import plain_attention, without_missing_weights
from deos_fx.models.views import is_offloaded, shallow_copy
from deos_fx.passes.finish import finish
from deos_fx.replaced import Replacement, replaced

__all__ = ["MaskBuilder", "capture", "check_guard"]

# Not every function that is written in C dispatches on proxies (factories that take sizes do not),
# so all are wrapped while tracing. One does and is left alone: layers whose weights compute for
# themselves (tensor subclasses of quantisation) ask whether they are in this very function.
_BUILTINS = tuple(
    (namespace, name)
    for namespace in (torch, functional)
    for name, function in vars(namespace).items()
    if isinstance(function, types.BuiltinFunctionType)
    and function is not functional.linear
    # Whether a value overrides torch's functions is no fact about the input.
    and not name.startswith(("_", "has_torch_function"))
)

# They make constants of the graph of sizes alone; a tensor made of other data is refused.
_FACTORIES = {"arange", "eye", "full", "linspace", "ones", "zeros"}


# Mask construction looks at values and at the attention implementation: one opaque node each.
def _makes_masks(name: str, value: Any) -> bool:
    """Whether this is a function, of transformers or of a model file, that makes masks."""
    named = name.startswith("create_") and "mask" in name and inspect.isfunction(value)
    return named and "config" in inspect.signature(value).parameters


# Results of these types describe the structure of the run, not its data: they are not recorded.
_STRUCTURAL_TYPES = (str, torch.dtype, torch.device, torch.layout, type(None))


@fx.node.has_side_effect
def check_guard(value: Any, expected: Any) -> None:
    """Raise `GuardError` unless ``value`` is what the captured run saw.

    Args:
        value: Result of a recorded comparison or length.
        expected: What it was during capture.
    """
    if value != expected:
        raise GuardError(f"captured for {expected!r}, called with {value!r}")


def with_features(x: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """`x` [B, N, ...] with other values at a key that takes all of the first two axes."""
    x = x.clone()
    x[key] = value
    return x


_PLAIN = {
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "position_ids",
    "layer_idx",
    "allow_is_causal_skip",
}


class MaskBuilder(nn.Module):
    """One of transformers' mask functions with its config, as a node of the graph.

    It stays opaque because what it returns (None, a boolean or an additive mask) depends on the
    attention implementation and on whether anything is padded.
    """

    def __init__(self, function: Callable[..., Any], config: Any) -> None:
        super().__init__()
        self.function = function
        self.config = config

    def is_plain(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether all that matters is which token comes first and what is padding."""
        given = {name for name, value in kwargs.items() if value is not None}
        return self.function is masking_utils.create_causal_mask and given <= _PLAIN

    def keeps_apart(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether samples of one row do not see each other where position ids start again.

        Blocks of image tokens are looked up at places inside a sample, as if in the whole row.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        causal = masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask
        return self.function in causal and "position_ids" in given and given <= _PLAIN

    def forward(self, **kwargs: Any) -> Any:
        return self.function(config=self.config, **kwargs)


class ImageEncoder(nn.Module):
    """From pixels to the features that enter the prompt, as one node of the graph.

    An encoder that reads the sizes of images into Python stays opaque: another size takes another
    path through it. Features of several images come out as one tensor [T, d].
    """

    def __init__(self, core: nn.Module, encode: Callable[..., Any]) -> None:
        super().__init__()
        self.core = core
        self.encode = encode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.encode(self.core, *args, **kwargs)
        output.pooler_output = _joined(output.pooler_output)
        for name, levels in output.items():
            # DeepStack: features of several depths, each a tensor per image.
            if isinstance(levels, list) and all(map(_are_images, levels)):
                output[name] = [_joined(level) for level in levels]
        return output


def _are_images(level: Any) -> bool:
    """Whether these are features of several images, and not of images with something else."""
    return isinstance(level, tuple) and all(isinstance(part, torch.Tensor) for part in level)


def _joined(images: Any) -> Any:
    """The features of several images as one, in the structure that the model's code expects."""
    return (torch.cat(list(images)),) if isinstance(images, (list, tuple)) else images


class ValueProxy(fx.Proxy):
    """An fx proxy that knows the value its node had in the example run."""

    def __init__(self, node: fx.Node, tracer: _Tracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # transformers asks isinstance(x, torch.Tensor) in many places.
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.value, name)
        if callable(attribute):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        if isinstance(attribute, (*_STRUCTURAL_TYPES, bool)):
            return attribute
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __getitem__(self, key: Any) -> Any:
        # Also where a mask for some layers is None now: the next batch may be padded.
        tracer: Any = self.tracer
        parts = tracer.mask_parts.get(self.node)
        if parts is None:
            item = tracer.create_proxy("call_function", operator.getitem, (self, key), {})
            mask = key[0] if isinstance(key, tuple) and key else key
            masked = isinstance(mask, ValueProxy) and mask.dtype == torch.bool
            if masked and self.value.dtype != torch.bool:
                # How many axes a row has that the mask selects, for fold_masked_add. Flags that
                # are read know nothing of the rows' content.
                item.node.meta["masked"] = self.value.ndim - mask.value.ndim
            return item
        if key not in parts:
            node = tracer.create_node("call_function", operator.getitem, (self.node, key), {})
            parts[key] = ValueProxy(node, tracer, tracer.values[node])
        return parts[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """From here on this stands for the tensor with something replaced.

        That can be rows that a mask selects, or the same features of all rows.
        """
        mask, *rest = key if isinstance(key, tuple) else (key,)
        tracer: Any = self.tracer
        masked = isinstance(mask, ValueProxy) and mask.dtype == torch.bool
        own: Any = self
        of_features = isinstance(key, tuple) and key[:2] == (slice(None),) * 2
        # Flags and counts of the whole prompt stay those of the whole prompt.
        counted = not own.dtype.is_floating_point and not _has_proxy(value)
        if (of_features or counted) and not _has_proxy(key):
            changed = tracer.create_proxy("call_function", with_features, (self, key, value), {})
            self.node, self.value = changed.node, changed.value
            return
        if not masked or any(part != slice(None) for part in rest):
            raise CaptureError(
                "The model's code assigns to a part of a tensor that no mask selects, which cannot "
                "be captured. Use a model that makes its inputs in another way."
            )
        trailing = self.value.ndim - mask.value.ndim
        for _ in range(trailing):
            mask = mask[..., None]
        if isinstance(value, ValueProxy) and value.dtype != own.dtype:
            value = value.to(own.dtype)
        if isinstance(value, ValueProxy) and value.value.ndim > trailing:
            changed = own.masked_scatter(mask, value)
        else:
            changed = torch.where(mask, value, own)
        self.node, self.value = changed.node, changed.value

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, torch.Tensor):
            # Unrolls the leading axis; fold_unstack removes it again where it can.
            parts: Any = self.tracer.create_proxy("call_function", torch.unbind, (self,), {})
            parts.node.meta["unrolled"] = len(self.value)
            return iter(parts[i] for i in range(len(self.value)))
        items: Any = self
        return iter(items[i] for i in range(len(self.value)))

    def __len__(self) -> int:
        length: Any = self.tracer.create_proxy("call_function", len, (self,), {})
        return int(length)

    def __bool__(self) -> bool:
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

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __contains__(self, key: Any) -> bool:
        return key in self.value

    def __hash__(self) -> int:
        # A number may be looked up among numbers.
        return hash(self._specialise(int)) if isinstance(self.value, int) else id(self)

    def _specialise(self, convert: Callable[[Any], Any]) -> Any:
        """Read the value into Python: from here on the graph holds for this value only."""
        value = convert(self.value)
        self.tracer.create_proxy("call_function", check_guard, (self, value), {})
        return value


class _SharedKeys(KVSharingDict):
    """What layers hand to later ones past the cache; notes who reads what whose."""

    def __init__(self, tracer: _Tracer, read: set[tuple[str, str]]) -> None:
        super().__init__()
        self.tracer = tracer
        self.read = read
        self.writers: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        self.read.add((self.writers[key], self.tracer.block))
        return super().__getitem__(key)

    def __setitem__(self, key: str, item: Any) -> None:
        self.writers[key] = self.tracer.block
        super().__setitem__(key, item)


class _Tracer(fx.Tracer):
    """Records one run; every node keeps the value it had."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, str]) -> None:
        super().__init__()
        self.root = model
        self.blocks = blocks
        self.values: dict[fx.Node, Any] = {}
        self.running = False
        # The transformer block that is running.
        self.block = ""
        # Nodes of what layers share past the cache.
        self.shared: dict[int, fx.Node] = {}
        self.module_paths = {id(module): path for path, module in model.named_modules()}
        self.leaves: dict[str, nn.Module] = {}
        self.graph = fx.Graph()
        # Masks by kind of layer: node of all of them -> kind -> proxy.
        self.mask_parts: dict[fx.Node, dict[Any, ValueProxy]] = {}

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """A leaf is every module that does not contain transformer blocks."""
        return not any(block.startswith(f"{path}.") or not path for block in self.blocks)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "placeholder":
            # Leaf modules read their own parameters while they run: not an access of glue code.
            self.running, outer = True, self.running
            self.values[node] = self._run(node)
            self.running = outer
        return node

    def proxy(self, node: fx.Node) -> Any:
        value = self.values[node]
        if isinstance(value, _STRUCTURAL_TYPES):
            return value
        return ValueProxy(node, self, value)

    def placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {}, name)
        self.values[node] = value
        return self.proxy(node)

    def call_leaf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, path = self._leaf_name(module), self.module_paths[id(module)]
        self.block = self.blocks.get(path, "")
        node = self.create_node(
            "call_module", name, self.create_arg(args), self.create_arg(kwargs), name
        )
        self.block = ""
        # What a block does to its tokens need not be run again to know the shape of the result.
        is_block = path in self.blocks and bool(args)
        value = self.values[node]
        alone = is_block and isinstance(value, tuple) and not any(v is not None for v in value[1:])
        tensors = [part for part in pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]
        if self.blocks.get(path, "").startswith("decoder_") and len(tensors) > 1:
            raise CaptureError(
                f"{name} hands more to the next layers than hidden states, and what that says of "
                "tokens cannot be followed when some are dropped. Use a model whose layers hand on "
                "hidden states alone."
            )
        if alone:
            # A tuple of the hidden states and of what was not asked for: the node has the former.
            self.values[node], self.leaves[name] = value[0], _first_of(module)
        node.meta["keeps_shape"] = is_block and _alike(self.values[node], args[0])
        output = (self.proxy(node), *value[1:]) if alone else self.proxy(node)
        # Hooks collect hidden states (transformers' output_hidden_states). They must see the
        # proxy: with the value, everything collected would become a constant of the graph.
        for hook_id, hook in module._forward_hooks.items():
            extra = (kwargs,) if hook_id in module._forward_hooks_with_kwargs else ()
            replaced = hook(module, args, *extra, output)
            output = output if replaced is None else replaced
        return output

    def call_mask_function(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        name = function.__name__.removeprefix("create_")
        if name in self.leaves:
            name = f"{name}_{len(self.leaves)}"
        self.leaves[name] = MaskBuilder(function, kwargs.pop("config"))
        node = self.create_node("call_module", name, (), self.create_arg(kwargs), name)
        if isinstance(self.values[node], dict):
            self.mask_parts[node] = {}
        # Also a proxy when the example run needed no mask: the next batch may be padded.
        return ValueProxy(node, self, self.values[node])

    def call_encoder(self, encode: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
        name = ENCODERS[encode.__name__]
        self.leaves[name] = ImageEncoder(core, encode)
        node = self.create_node(
            "call_module", name, self.create_arg(args), self.create_arg(kwargs), name
        )
        node.meta["example"] = self.values[node]
        return self.proxy(node)

    def attributes(self) -> dict[str, Any]:
        """Everything the recorded nodes refer to, by target."""
        return {
            node.target: self._attribute(node.target)
            for node in self.graph.nodes
            if node.op in ("call_module", "get_attr")
        }

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, KVSharingDict):
            return self._shared_keys(a)
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            if a.numel() == 1:
                # Reading a number from an input left a guard, so this one is a true constant.
                where = {"dtype": a.dtype, "device": a.device}
                return self.create_node("call_function", torch.tensor, (a.tolist(),), where)
            raise CaptureError(
                f"A tensor of shape {tuple(a.shape)} computed outside the graph would become a "
                "constant of it and freeze this input's data. Pass it as a model input."
            )
        return super().create_arg(a)

    def _shared_keys(self, given: KVSharingDict) -> fx.Node:
        """The node that makes what layers share, at first empty, anew in every run."""
        if id(given) not in self.shared:
            node = self.create_node("call_function", KVSharingDict, (), {}, "shared_keys")
            node.meta["shared"] = set()
            self.values[node] = _SharedKeys(self, node.meta["shared"])
            self.shared[id(given)] = node
        return self.shared[id(given)]

    def _leaf_name(self, module: nn.Module) -> str:
        """A short target (``decoder_3``, ``lm_head``), so that the printed graph can be read."""
        path = self.module_paths[id(module)]
        name = self.blocks.get(path, path.rpartition(".")[2])
        if self.leaves.setdefault(name, module) is not module:
            name = path.replace(".", "_")
            self.leaves[name] = module
        return name

    def _attribute(self, target: str) -> Any:
        return self.leaves.get(target) or operator.attrgetter(target)(self.root)

    def _run(self, node: fx.Node) -> Any:
        if node.op == "output":
            return None
        target: Any = node.target
        if node.op == "get_attr":
            return self._attribute(target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "call_module":
            return self._attribute(target).forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def capture(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    block_names: Mapping[str, str],
    *,
    opaque_encoder: bool = False,
) -> fx.GraphModule:
    """Record one forward pass as a graph of blocks and glue.

    Args:
        model: The unmodified model, in eval mode. Its weights are shared, never copied.
        inputs: Arguments of its forward. Tensors, caches and numbers become graph inputs,
            everything else is part of the structure and specialised.
        block_names: Module path of every transformer block -> node name.
        opaque_encoder: Record the image encoder as one node.

    Returns:
        A `GraphModule` with the same inputs that returns a dict of the model's output fields;
        ``meta["output_class"]`` is the model's output class, ``meta["blocks"]`` has all blocks by
        node name, also those whose output nothing uses.

    Raises:
        CaptureError: If the model's code does something that cannot be recorded.
    """
    tracer = _Tracer(model, block_names)
    _check_offloaded(tracer, model)
    arguments = {
        name: tracer.placeholder(name, value) if _is_data(value) else value
        for name, value in inputs.items()
    }
    result = _record(tracer, model, arguments, opaque_encoder)
    fields = {name: value for name, value in result.items() if value is not None}
    tracer.create_node("output", "output", (tracer.create_arg(fields),), {})
    graph_module = fx.GraphModule(tracer.attributes(), tracer.graph, f"{type(model).__name__}Graph")
    graph_module.meta["output_class"] = type(result)
    graph_module.meta["blocks"] = {
        name: model.get_submodule(path) for path, name in block_names.items()
    }
    return finish(graph_module)


# Who records what this thread runs.
_TRACER: ContextVar[_Tracer | None] = ContextVar("deos_fx_tracer", default=None)

# A model's code writes to the model while it runs, so captures take turns.
_CAPTURING = threading.RLock()


def _replacements(model: PreTrainedModel, opaque_encoder: bool) -> Iterator[Replacement]:
    """What does not dispatch on proxies, and what sends it to the tracer of the thread."""
    core: Any = type(model.base_model)
    for method in ENCODERS if opaque_encoder else ():
        if hasattr(core, method):
            yield core, method, _when_traced(_encode)
    for name in ("get_seq_length", "get_mask_sizes"):
        yield Cache, name, _when_traced(_length)
    yield nn.Module, "__call__", _when_traced(_call)
    yield nn.Module, "__getattr__", _when_traced(_getattr)
    for owner, name in _BUILTINS:
        yield owner, name, _when_traced(_function)
    for kind in {type(module) for module in model.modules()}:
        for name in SHORTCUTS.keys() & vars(kind).keys():
            yield kind, name, _when_traced(_first_arguments)
    for namespace in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name, value in list(vars(namespace).items()):
            if _makes_masks(name, value):
                yield namespace, name, _when_traced(_mask)
            elif value is torch_compilable_check:
                # It compares tensors in Python; the inputs were checked before capture.
                yield namespace, name, _when_traced(_no_check)


def _is_data(value: Any) -> bool:
    """Whether an argument is an input of the graph: numbers may steer no more than the head."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or isinstance(value, (torch.Tensor, Cache))


def _record(
    tracer: _Tracer, model: PreTrainedModel, arguments: dict[str, Any], opaque_encoder: bool
) -> Any:
    """Run the model's forward with the tracer on; everything is put back, also on error."""
    replacements = _replacements(model, opaque_encoder)
    # Kernels that are compiled at their first call would be compiled as replaced for tracing.
    plain = plain_attention()
    with _CAPTURING, torch.no_grad(), without_missing_weights(model), plain, replaced(replacements):
        token = _TRACER.set(tracer)
        try:
            return type(model).forward(model, **arguments)
        finally:
            _TRACER.reset(token)


def _check_offloaded(tracer: _Tracer, model: nn.Module) -> None:
    """Refuse offloaded weights that glue reads: hooks bring them in for whole modules only."""
    for path, module in model.named_modules():
        if not tracer.is_leaf_module(module, path) and is_offloaded(module):
            names = [name for name, _ in module.named_parameters(recurse=False)]
            raise CaptureError(
                f"{', '.join(names)} of {path or 'the model'} are offloaded, and the model's code "
                "reads them between its layers. Give them a device of their own in device_map."
            )


def _first_of(module: nn.Module) -> nn.Module:
    """A view of a module that returns the first of its outputs; it shares everything else."""
    kind: Any = type(module)
    view = shallow_copy(module)
    hooked = vars(view).pop("forward", None)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = hooked or functools.partial(kind.forward, self)
        return whole(*args, **kwargs)[0]

    view.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return view


# *** what stands in for a function in the thread that captures ***

_Traced = Callable[[_Tracer, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _when_traced(traced: _Traced) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that goes to the tracer of its thread, if there is one."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            tracer = _TRACER.get()
            if tracer is None:
                return original(*args, **kwargs)
            return traced(tracer, original, args, kwargs)

        return function

    return make


def _call(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    module, *rest = args
    path = tracer.module_paths.get(id(module))
    if path is None or not _has_proxy((rest, kwargs)) or not tracer.is_leaf_module(module, path):
        return original(*args, **kwargs)
    return tracer.call_leaf(module, tuple(rest), kwargs)


def _first_arguments(
    tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A function that matters for some of its arguments only, and returns these."""
    return args[1 : 1 + SHORTCUTS[original.__name__]]


def _length(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lengths of a cache are for masks and positions: a layer that counts by its own is refused."""
    if tracer.block:
        raise CaptureError(
            f"{tracer.block} counts positions itself, by the length of its cache, which is "
            "shorter where tokens were dropped. Use a model that gives its layers positions."
        )
    return original(*args, **kwargs)


def _encode(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    core, *rest = args
    if _has_proxy((rest, kwargs)):
        return tracer.call_encoder(original, core, tuple(rest), kwargs)
    return original(*args, **kwargs)


def _getattr(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Parameters and buffers that glue code reads become get_attr nodes."""
    module, name = args
    value = original(module, name)
    path = tracer.module_paths.get(id(module))
    if tracer.running or path is None or not isinstance(value, torch.Tensor):
        return value
    return tracer.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})


def _function(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    makes = original.__name__ in _FACTORIES
    if not tracer.running and (makes or _has_proxy((args, kwargs))):
        return tracer.create_proxy("call_function", original, args, kwargs)
    return original(*args, **kwargs)


def _mask(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if tracer.running:
        return original(*args, **kwargs)
    named = inspect.signature(original).bind(*args, **kwargs).arguments
    return tracer.call_mask_function(original, named)


def _no_check(tracer: _Tracer, original: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """A check that is left out."""


def _alike(output: Any, hidden: Any) -> bool:
    """Whether a block's output is a tensor like the hidden states that came in."""
    before = hidden.value if isinstance(hidden, ValueProxy) else hidden
    both_tensors = isinstance(output, torch.Tensor) and isinstance(before, torch.Tensor)
    return both_tensors and (output.shape, output.dtype) == (before.shape, before.dtype)


def _has_proxy(arguments: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(arguments))
