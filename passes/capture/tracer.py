"""The tracer, which records one run of a model.

Every node is computed as soon as it is recorded, and its value is kept: the model's code goes on
with a proxy that knows it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import KVSharingDict

from deos_fx.errors import CaptureError
from deos_fx.models.blocks import Block, indexes_keys, only_keeps_state
from deos_fx.models.families import ENCODERS
from deos_fx.models.sharded import gathered, shards
from deos_fx.passes.capture.handed_on import Handed, Handing, places_of
from deos_fx.passes.capture.in_front import InFront
from deos_fx.passes.capture.key_angles import ANGLES, keeping_angles
from deos_fx.passes.capture.leaves import ImageEncoder, MaskBuilder, first_of
from deos_fx.passes.capture.proxy import STRUCTURAL_TYPES, ValueProxy
from deos_fx.passes.notes import annotate

__all__ = ["Tracer"]

# Nodes in which the model's code, and not a layer, computes with a value.
_COMPUTING = ("call_function", "call_method")


class _SharedKeys(KVSharingDict):
    """Keys and values that layers share outside the cache; notes who reads whose keys.

    Args:
        tracer: Knows the running layer.
        read: Gets a pair of the writing and the reading block for every read.
    """

    def __init__(self, tracer: Tracer, read: set[tuple[Block, Block]]) -> None:
        super().__init__()
        self.tracer = tracer
        self.read = read
        self.writers: dict[str, Block] = {}

    def __getitem__(self, key: str) -> Any:
        self.read.add((self.writers[key], self.tracer.running_block()))
        return super().__getitem__(key)

    def __setitem__(self, key: str, item: Any) -> None:
        self.writers[key] = self.tracer.running_block()
        super().__setitem__(key, item)


class Tracer(fx.Tracer):
    """Records one run of a model, with the value of every node.

    Args:
        model: The model.
        blocks: Module path of every transformer block -> the block.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block]) -> None:
        super().__init__()
        self.root = model
        self.blocks = blocks
        self.values: dict[fx.Node, Any] = {}
        # Whether a node is being run; what happens inside it is not recorded.
        self.running = False
        # The transformer block that is running.
        self.block: Block | None = None
        # Nodes of the dicts that layers share outside the cache, by id of the model's dict.
        self.shared: dict[int, fx.Node] = {}
        self.handing = Handing(self)
        # The views of blocks that nodes call in their place.
        self.views: dict[Block, nn.Module] = {}
        # Replaced functions get modules, and need their paths.
        self.module_paths = {id(module): path for path, module in model.named_modules()}
        # Target of a call_module node -> its module, which need not be one of the model.
        self.leaves: dict[str, nn.Module] = {}
        self.graph = fx.Graph()
        # Masks by kind of layer: node of all of them -> kind -> proxy.
        self.mask_parts: dict[fx.Node, dict[Any, ValueProxy]] = {}
        # Whether the model's code keeps the positions of all tokens, as layers rotate keys again.
        self.keeps_positions = False
        # Of a model that puts images in front of its text.
        self.in_front: InFront | None = None

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """Return whether a module is one node: it contains no transformer block, but may be one."""
        # The path of the model itself is empty: it contains everything.
        return not any(block.startswith(f"{path}.") or not path for block in self.blocks)

    def running_block(self) -> Block:
        """Return the block that is running; there is one wherever keys are shared."""
        assert self.block is not None, "keys are shared outside of all blocks"
        return self.block

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
            self.values[node] = self._run_alone(node)
        return node

    def mask_of(self, node: fx.Node) -> Any:
        """Return the flags of a mask that is None where nothing is padded; it is made from now on.

        The model's code computes with it, after it has made one if there was none.
        """
        leaf = self.leaves.get(str(node.target))
        if isinstance(leaf, MaskBuilder) and leaf.is_of_padding:
            leaf.always = True
            self.values[node] = self._run_alone(node)
        return self.values[node]

    def proxy(self, node: fx.Node) -> Any:
        """Return a proxy of a node, or the value itself if it is not data."""
        value = self.values[node]
        if isinstance(value, STRUCTURAL_TYPES):
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
            A proxy of the output. If a block returns a tuple of the hidden states and of None, or
            of what a decoder layer hands on to later ones, a tuple of the same length with a proxy
            of the hidden states.

        Raises:
            CaptureError: If a decoder layer hands on anything but tensors.
        """
        name, path = self._leaf_name(module), self.module_paths[id(module)]
        # Known while the block runs: it must not read the length of its cache (see `_length` in
        # replacements.py).
        self.block = block = self.blocks.get(path)
        takes, given = places_of(kwargs), kwargs
        if takes:
            self.leaves[name], given = self.handing.given(module, takes, kwargs)
        if block is not None and self.keeps_positions and ANGLES in kwargs and indexes_keys(module):
            self.leaves[name] = self.views[block] = keeping_angles(self.leaves[name], block.index)
        node = self.create_node(
            "call_module", name, self.create_arg(args), self.create_arg(given), name
        )
        # A block that gets its hidden states by keyword is left as it is: they are looked for in
        # `args`.
        is_block = block is not None and bool(args)
        value = self.values[node]
        others = value[1:] if is_block and isinstance(value, tuple) else None
        # More than one tensor in the output: hidden states, and something else about tokens.
        more = block is not None and block.stage == "decoder" and len(_tensors(value)) > 1
        if others and (takes or more):
            # Case: the node stands for the hidden states, and the others go on beside it.
            self.values[node] = value[0]
            self.leaves[name], others = self.handing.hand_on(node, module, takes, others)
        elif others is not None and all(other is None for other in others):
            # Case: the others are None, or there are none.
            self.values[node], self.leaves[name] = value[0], first_of(self.leaves[name])
        elif more:
            raise Handed((name, 1)).refused()
        else:
            others = None
        self.block = None
        # annotate_token_spaces need not run a block to know the shape of its result.
        keeps_shape = is_block and _alike(self.values[node], args[0])
        indexes = block is not None and (indexes_keys(module) or self.handing.reads(block))
        stateful = block is not None and only_keeps_state(module)
        annotate(node, block=block, keeps_shape=keeps_shape, indexes=indexes, stateful=stateful)
        output = self.proxy(node) if others is None else (self.proxy(node), *others)
        # Hooks collect hidden states (transformers' output_hidden_states). They must see the
        # proxy: with the value, everything collected would become a constant of the graph. What
        # they return counts when the graph runs, which calls the module with its hooks.
        for hook_id, hook in module._forward_hooks.items():
            if shards(hook):
                continue
            extra = (kwargs,) if hook_id in module._forward_hooks_with_kwargs else ()
            hook(module, args, *extra, output)
        return output

    def call_mask_function(
        self, function: Callable[..., Any], kwargs: dict[str, Any], own: bool = False
    ) -> Any:
        """Record the call of a mask function of transformers as one opaque node.

        Args:
            function: The function, ``create_...``.
            kwargs: Its arguments by name, with the config.
            own: See `MaskBuilder`.

        Returns:
            A proxy of the mask, or of the dict of masks by kind of layer.
        """
        name = function.__name__.removeprefix("create_")
        # The same function may be called more than once.
        if name in self.leaves:
            name = f"{name}_{len(self.leaves)}"
        self.leaves[name] = MaskBuilder(function, kwargs.pop("config"), own)
        node = self.create_node("call_module", name, (), self.create_arg(kwargs), name)
        if isinstance(self.values[node], dict):
            self.mask_parts[node] = {}
        # A proxy even where the mask is None in the example run: the next batch may be padded.
        return ValueProxy(node, self, self.values[node])

    def call_encoder(
        self,
        encode: Callable[..., Any],
        core: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
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
        annotate(node, example=self.values[node])
        return self.proxy(node)

    def always_make_masks(self) -> None:
        """Let masks of padding that code computes with be made where nothing is padded, too."""
        for node in self.graph.find_nodes(op="call_module"):
            leaf = self.leaves.get(str(node.target))
            if isinstance(leaf, MaskBuilder) and leaf.is_of_padding:
                leaf.always |= any(user.op in _COMPUTING for user in node.users)

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
        if isinstance(a, Handed):
            # Case: an output of a layer that goes anywhere but into a layer, by name.
            raise a.refused()
        if isinstance(a, KVSharingDict):
            # Case: a dict that layers share. It is made by the model's code, and not an input.
            return self._shared_keys(a)
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            if a.numel() == 1:
                # Case: one number. If it was read from an input, that left a guard, so it is a
                # constant of the graph.
                where = {"dtype": a.dtype, "device": a.device}
                return self.create_node("call_function", torch.tensor, (a.tolist(),), where)
            raise CaptureError(
                f"A tensor of shape {tuple(a.shape)} computed outside the graph would become a "
                "constant of it and freeze this input's data. Pass it as a model input."
            )
        return super().create_arg(a)

    def _shared_keys(self, given: KVSharingDict) -> fx.Node:
        """Return the node of a dict that layers share; each run starts with an empty one."""
        # By identity, since all blocks of a run are given the same dict.
        if id(given) not in self.shared:
            node = self.create_node("call_function", KVSharingDict, (), {}, "shared_keys")
            read: set[tuple[Block, Block]] = set()
            annotate(node, shared=read)
            # In the example run, the dict also notes who reads whose keys.
            self.values[node] = _SharedKeys(self, read)
            self.shared[id(given)] = node
        return self.shared[id(given)]

    def _leaf_name(self, module: nn.Module) -> str:
        """Choose a short target (``decoder_3``, ``lm_head``) that reads well in a printed graph."""
        path = self.module_paths[id(module)]
        block = self.blocks.get(path)
        name = block.name if block else path.rpartition(".")[2]
        if self.leaves.setdefault(name, module) is not module:
            # Case: another module has this name. Use the whole path.
            name = path.replace(".", "_")
            self.leaves[name] = module
        return name

    def _attribute(self, target: str) -> Any:
        """Return the leaf module, parameter or buffer that a target names."""
        return self.leaves.get(target) or operator.attrgetter(target)(self.root)

    def _run_alone(self, node: fx.Node) -> Any:
        """Compute a node's value, and record nothing: a leaf reads parameters, calls functions."""
        self.running, outer = True, self.running
        value = self._run(node)
        self.running = outer
        return value

    def _run(self, node: fx.Node) -> Any:
        """Compute a node's value from those of its inputs."""
        if node.op == "output":
            return None
        target: Any = node.target
        if node.op == "get_attr":
            return self._attribute(target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "call_module":
            # Not a call: the replaced `nn.Module.__call__` would record the module again.
            module = self._attribute(target)
            with gathered(module):
                return module.forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a nested value."""
    return [part for part in pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]


def _alike(output: Any, hidden: Any) -> bool:
    """Return whether a block's output is a tensor of its input's shape and dtype."""
    before = hidden.value if isinstance(hidden, ValueProxy) else hidden
    both_tensors = isinstance(output, torch.Tensor) and isinstance(before, torch.Tensor)
    return both_tensors and (output.shape, output.dtype) == (before.shape, before.dtype)
