"""The tracer, which records one run, and its proxies, which know their values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import KVSharingDict

from deos_fx.errors import CaptureError
from deos_fx.models.families import ENCODERS
from deos_fx.passes.capture.guards import check_guard
from deos_fx.passes.capture.leaves import ImageEncoder, MaskBuilder, first_of

__all__ = ["Tracer", "ValueProxy", "has_proxy", "with_features"]

# Results of these types describe the structure of the run, not its data, and are not recorded.
_STRUCTURAL_TYPES = (str, torch.dtype, torch.device, torch.layout, type(None))


def with_features(x: torch.Tensor, key: Any, value: Any) -> torch.Tensor:
    """Return a copy of `x` [B, N, ...] with `value` at `key`, in place of ``x[key] = value``."""
    x = x.clone()
    x[key] = value
    return x


class ValueProxy(fx.Proxy):
    """An fx proxy that knows the value of its node in the example run."""

    def __init__(self, node: fx.Node, tracer: Tracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # transformers asks isinstance(x, torch.Tensor) in many places.
        return type(self.value)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.value, name)
        if callable(attribute):
            # Case: a method. Its call is recorded.
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        if isinstance(attribute, (*_STRUCTURAL_TYPES, bool)):
            return attribute
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __getitem__(self, key: Any) -> Any:
        tracer: Any = self.tracer
        parts = tracer.mask_parts.get(self.node)
        if parts is None:
            # Case: anything but a dict of masks by kind of layer.
            item = tracer.create_proxy("call_function", operator.getitem, (self, key), {})
            mask = key[0] if isinstance(key, tuple) and key else key
            masked = isinstance(mask, ValueProxy) and mask.dtype == torch.bool
            if masked and self.value.dtype != torch.bool:
                # For fold_masked_add: the number of axes of a row that the mask selects. Reads of
                # flags are not marked, since they carry no content.
                item.node.meta["masked"] = self.value.ndim - mask.value.ndim
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
        mask, *rest = key if isinstance(key, tuple) else (key,)
        tracer: Any = self.tracer
        masked = isinstance(mask, ValueProxy) and mask.dtype == torch.bool
        own: Any = self
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
        # The guard compares booleans, so that any value of the same truth passes it.
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
        # A number may be looked up in a set or dict of numbers.
        return hash(self._specialise(int)) if isinstance(self.value, int) else id(self)

    def _specialise(self, convert: Callable[[Any], Any]) -> Any:
        """Read the value into Python, and guard that it is the same at every later run."""
        value = convert(self.value)
        self.tracer.create_proxy("call_function", check_guard, (self, value), {})
        return value


class _SharedKeys(KVSharingDict):
    """Keys and values that layers share outside the cache; records which layer reads which one's.

    Args:
        tracer: Knows the running layer.
        read: Gets the pairs of the layer that wrote and the layer that reads.
    """

    def __init__(self, tracer: Tracer, read: set[tuple[str, str]]) -> None:
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


class Tracer(fx.Tracer):
    """Records one run of a model, with the value of every node.

    Args:
        model: The model.
        blocks: Module path of every transformer block -> node name.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, str]) -> None:
        super().__init__()
        self.root = model
        self.blocks = blocks
        self.values: dict[fx.Node, Any] = {}
        # Whether a node is being run: what happens inside it is not recorded.
        self.running = False
        # The transformer block that is running.
        self.block = ""
        # Nodes of the dicts that layers share outside the cache, by id of the model's dict.
        self.shared: dict[int, fx.Node] = {}
        self.module_paths = {id(module): path for path, module in model.named_modules()}
        self.leaves: dict[str, nn.Module] = {}
        self.graph = fx.Graph()
        # Masks by kind of layer: node of all of them -> kind -> proxy.
        self.mask_parts: dict[fx.Node, dict[Any, ValueProxy]] = {}

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """Return whether a module is one node: it does not contain transformer blocks."""
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
        """Record a node and, unless it is an input, run it."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "placeholder":
            # A leaf module that runs reads its own parameters: glue code does not read them.
            self.running, outer = True, self.running
            self.values[node] = self._run(node)
            self.running = outer
        return node

    def proxy(self, node: fx.Node) -> Any:
        """Return a proxy of a node, or the value itself if it is not data."""
        value = self.values[node]
        if isinstance(value, _STRUCTURAL_TYPES):
            return value
        return ValueProxy(node, self, value)

    def placeholder(self, name: str, value: Any) -> Any:
        """Record an input of the graph with its value in the example run."""
        node = self.create_node("placeholder", name, (), {}, name)
        self.values[node] = value
        return self.proxy(node)

    def call_leaf(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the call of a leaf module as one node.

        Args:
            module: The module.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            A proxy of the output. Where a block returns a tuple of the hidden states and None for
            everything else: such a tuple with a proxy of the hidden states.

        Raises:
            CaptureError: If a decoder layer hands more than hidden states to the next layers.
        """
        name, path = self._leaf_name(module), self.module_paths[id(module)]
        self.block = self.blocks.get(path, "")
        node = self.create_node(
            "call_module", name, self.create_arg(args), self.create_arg(kwargs), name
        )
        self.block = ""
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
            # The other outputs are None: the node stands for the hidden states alone.
            self.values[node], self.leaves[name] = value[0], first_of(module)
        # annotate_token_spaces need not run a block to know the shape of its result.
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
        """Record the call of a mask function of transformers as one opaque node.

        Args:
            function: The function, ``create_...``.
            kwargs: Its arguments by name, with the config.

        Returns:
            A proxy of the mask, or of the dict of masks by kind of layer.
        """
        name = function.__name__.removeprefix("create_")
        if name in self.leaves:
            name = f"{name}_{len(self.leaves)}"
        self.leaves[name] = MaskBuilder(function, kwargs.pop("config"))
        node = self.create_node("call_module", name, (), self.create_arg(kwargs), name)
        if isinstance(self.values[node], dict):
            self.mask_parts[node] = {}
        # A proxy even where the mask is None in the example run: the next batch may be padded.
        return ValueProxy(node, self, self.values[node])

    def call_encoder(self, encode: Callable[..., Any], core: Any, args: Any, kwargs: Any) -> Any:
        """Record the call of an image encoder as one opaque node.

        Args:
            encode: The method that encodes.
            core: The model that it is a method of.
            args: Its other arguments.
            kwargs: Its keyword arguments.

        Returns:
            A proxy of the output.
        """
        name = ENCODERS[encode.__name__]
        self.leaves[name] = ImageEncoder(core, encode)
        node = self.create_node(
            "call_module", name, self.create_arg(args), self.create_arg(kwargs), name
        )
        node.meta["example"] = self.values[node]
        return self.proxy(node)

    def attributes(self) -> dict[str, Any]:
        """Return the modules, parameters and buffers that recorded nodes refer to, by target."""
        return {
            node.target: self._attribute(node.target)
            for node in self.graph.nodes
            if node.op in ("call_module", "get_attr")
        }

    def create_arg(self, a: Any) -> Any:
        """Turn an argument of a call into an argument of a node.

        Raises:
            CaptureError: If it holds a tensor of several values computed outside the graph.
        """
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
        """Return the node of a dict that layers share; every run makes it anew, and empty."""
        if id(given) not in self.shared:
            node = self.create_node("call_function", KVSharingDict, (), {}, "shared_keys")
            node.meta["shared"] = set()
            self.values[node] = _SharedKeys(self, node.meta["shared"])
            self.shared[id(given)] = node
        return self.shared[id(given)]

    def _leaf_name(self, module: nn.Module) -> str:
        """Choose a short target (``decoder_3``, ``lm_head``): printed graphs are to be read."""
        path = self.module_paths[id(module)]
        name = self.blocks.get(path, path.rpartition(".")[2])
        if self.leaves.setdefault(name, module) is not module:
            # Another module has this name: use the whole path.
            name = path.replace(".", "_")
            self.leaves[name] = module
        return name

    def _attribute(self, target: str) -> Any:
        """Return the leaf module, parameter or buffer that a target names."""
        return self.leaves.get(target) or operator.attrgetter(target)(self.root)

    def _run(self, node: fx.Node) -> Any:
        """Compute a node's value from those of its inputs."""
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


def _alike(output: Any, hidden: Any) -> bool:
    """Return whether a block's output is a tensor of its input's shape and dtype."""
    before = hidden.value if isinstance(hidden, ValueProxy) else hidden
    both_tensors = isinstance(output, torch.Tensor) and isinstance(before, torch.Tensor)
    return both_tensors and (output.shape, output.dtype) == (before.shape, before.dtype)


def has_proxy(arguments: Any) -> bool:
    """Return whether there is a proxy anywhere in nested arguments."""
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(arguments))
