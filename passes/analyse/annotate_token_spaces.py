"""Find the axes of values that run over the tokens of the prompt.

The graph is run twice on shapes alone, for two prompt lengths. An axis whose length changes is a
prompt axis. Weights are not touched, and values take no memory.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree
from transformers import Cache

from deos_fx.errors import CaptureError
from deos_fx.models.shapes_only import ShapesOnly, shaped
from deos_fx.passes.capture.leaves import MaskBuilder
from deos_fx.passes.graph import made_of
from deos_fx.passes.notes import MASK, annotate, note_of
from deos_fx.tokens.cache import tensors_of

PROMPT_MASK = "prompt_mask"
"""The input that `mark_prompt` adds."""

__all__ = [
    "PROMPT_MASK",
    "annotate_token_spaces",
    "kind_of_mask",
    "padding_node",
    "position_tables",
]

# Kinds of masks, in transformers' words, that say only which tokens are padding: those of layers
# that keep a running state and do not attend.
_OF_PADDING = {"conv", "linear_attention", "recurrent_attention_mask"}


def annotate_token_spaces(
    graph_module: fx.GraphModule, inputs: Mapping[str, Any], length_of: str = "input_ids"
) -> fx.GraphModule:
    """Write the axes, shape, dtype, content and kind of mask of every value into its node's note.

    1. An ``attention_mask`` with an axis of queries is a mask, and so is what transformers' mask
       functions make.
    2. The prompt axis of any other value is the one whose length differs between the two runs.

    Args:
        graph_module: A captured graph.
        inputs: The example inputs it was captured with.
        length_of: Name of the input whose last axis is the prompt.

    Returns:
        The same graph module, annotated.

    Raises:
        CaptureError: If a value has two prompt axes and is not a mask.
    """
    length = inputs[length_of].shape[-1]
    # While decoding, a mask covers everything in the cache and the new tokens.
    lengths = {length, *(v.get_seq_length() for v in inputs.values() if _is_cache(v))}
    names = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
    # The second prompt is longer by 8 tokens. Any number would do.
    prompts = [[_extended(name, inputs[name], lengths, more) for name in names] for more in (0, 8)]
    runs = [_ShapeRun(graph_module).note(prompt) for prompt in prompts]
    shapes = [run.shapes for run in runs]
    prepared_mask = None
    for node in graph_module.graph.nodes:
        axes, padding, plain = None, False, None
        if node.target == "attention_mask" and inputs["attention_mask"].ndim == 4:
            # Case 1: the caller gives a whole mask of queries and keys.
            axes, prepared_mask = MASK, node
        elif _is_mask_builder(graph_module, node):
            # Case 1: a function of transformers makes the mask, or one is taken out of its dict.
            axes, padding = MASK, kind_of_mask(node) in _OF_PADDING
            if node.op == "call_module":
                builder: Any = graph_module.get_submodule(str(node.target))
                # A function that is given a whole mask passes it on, with whatever blocks it has.
                prepared = prepared_mask in node.all_input_nodes
                plain = builder.is_plain(node.kwargs) and not prepared
        elif _is_of_padding(node):
            # Case 1: flags of padding in another type.
            axes, padding = MASK, True
        elif node.op != "output":
            # Case 2: any other value.
            axes = pytree.tree_map(
                _changed_axis, shapes[0][node], shapes[1][node], is_leaf=_is_shape
            )
        annotate(
            node,
            axes=axes,
            shape=shapes[0].get(node),
            dtype=runs[0].dtypes.get(node),
            content=node in runs[0].content,
            padding=padding,
            plain=plain,
            # Its shape is known now, so the features of the example run can be freed.
            example=None,
        )
    return graph_module


def position_tables(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Find the rotary tables: modules that read the position ids, and no others that are learned.

    Frequencies may be learned as well; such a module returns cosines and sines.
    """
    return [
        node
        for node in graph_module.graph.find_nodes(op="call_module")
        if any(source.name == "position_ids" for source in node.all_input_nodes)
        and not note_of(node).is_mask
        and (
            not list(graph_module.get_submodule(str(node.target)).parameters())
            or (note_of(node).block is None and isinstance(note_of(node).axes, tuple))
        )
    ]


def padding_node(graph_module: fx.GraphModule) -> fx.Node | None:
    """Return the input with flags [B, N] of the tokens that reductions may look at.

    These are the real tokens of the prompt; in a search, those before the answer. None if the call
    has no such input.
    """
    for marked in graph_module.graph.find_nodes(op="placeholder", target=PROMPT_MASK):
        return marked
    found = graph_module.graph.find_nodes(op="placeholder", target="attention_mask")
    return next((node for node in found if not note_of(node).is_mask), None)


def kind_of_mask(mask: fx.Node) -> str:
    """Return the name of the kind of layers that a mask is for, or of the node's target.

    A mask that was taken out of a dict is named by its key, any other by the module that makes it.
    """
    return str(mask.args[1] if mask.target is operator.getitem else mask.target)


def _is_mask_builder(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node makes masks, or takes one out of a dict of masks."""
    if node.target is operator.getitem:
        # Case: perhaps one mask of a dict of masks by kind of layer.
        return _is_mask_builder(graph_module, node.all_input_nodes[0])
    return node.op == "call_module" and isinstance(
        graph_module.get_submodule(str(node.target)), MaskBuilder
    )


def _is_of_padding(node: fx.Node) -> bool:
    """Return whether a node computes with a mask of padding alone, such as a change of its type."""
    if node.op != "call_method" or len(node.all_input_nodes) != 1:
        return False
    return note_of(node.all_input_nodes[0]).padding and node.target in ("bool", "to", "contiguous")


class _ShapeRun(fx.Interpreter):
    """An interpreter that runs a graph on shapes, and notes every value's shape."""

    def note(self, args: list[Any]) -> _ShapeRun:
        """Run the graph on its inputs, in order, and return the interpreter with its notes."""
        # What the output is made of; anything else is read by guards alone.
        self.needed = made_of(cast(fx.Graph, self.module.graph).output_node())
        self.shapes: dict[fx.Node, Any] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        self.content: set[fx.Node] = set()
        # Autograd tells which values depend on contents: those that require a gradient. The caller
        # may be in inference mode, where nothing does.
        with torch.inference_mode(False), torch.enable_grad(), ShapesOnly():
            self.run(*pytree.tree_map_only(torch.Tensor, _tracked, args, is_leaf=_is_cache))
        return self

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or make up a value of its shape."""
        if n.op != "placeholder" and n not in self.needed:
            # Case: only guards read it. It may look at values, and there are none.
            value = None
        elif note_of(n).example is not None:
            # Case: an opaque image encoder. It reads sizes of images, and these do not change with
            # the prompt, so its result has the shapes of the example run.
            value = pytree.tree_map_only(torch.Tensor, _like, note_of(n).example)
        elif note_of(n).keeps_shape:
            # Case: a block that keeps the shape of its input. It is not run: experts are chosen by
            # value, and not every kernel runs on shapes.
            value = _like(self.fetch_args_kwargs_from_env(n)[0][0])
        else:
            value = super().run_node(n)
        self.shapes[n] = pytree.tree_map(_shape, value, is_leaf=_is_cache)
        if isinstance(value, torch.Tensor):
            self.dtypes[n] = value.dtype
        leaves = pytree.tree_leaves(value, is_leaf=_is_cache)
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
            self.content.add(n)
        return pytree.tree_map_only(torch.Tensor, _light, value, is_leaf=_is_cache)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module on shapes."""
        module: Any = self.fetch_attr(target)
        if isinstance(module, MaskBuilder):
            if module.own:
                # Case: a method of the model. It is given the length of the cache, which the
                # capture has filled.
                return None
            # Case: a mask function, which reads the values of flags.
            masks = module(**pytree.tree_map_only(torch.Tensor, _readable, kwargs))
            return pytree.tree_map_only(torch.Tensor, _like, masks)
        return shaped(module)(*args, **kwargs)


def _tracked(tensor: torch.Tensor) -> torch.Tensor:
    """Prepare an input: floats lose their values and are tracked, integers and flags keep theirs.

    Code may read integers, which count something. A single float (such as the number of items that
    a loss is averaged over) is no token's content and is not tracked.
    """
    if not tensor.is_floating_point():
        return tensor.clone()
    return _like(tensor) if tensor.numel() > 1 else _like(tensor).detach()


def _light(tensor: torch.Tensor) -> torch.Tensor:
    """Detach a value from its history; floats lose their values, integers and flags keep them."""
    if tensor.is_floating_point():
        return _like(tensor).requires_grad_(tensor.requires_grad)
    return tensor


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Set all flags that have lost their values: mask functions ask whether all are set."""
    if tensor.is_meta and tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return tensor


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the same shape and dtype without values; floats require a gradient."""
    shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return shape.requires_grad_(tensor.is_floating_point())


class _Shape(tuple[int, ...]):
    """A tensor's shape as a leaf of a nested structure."""


def _is_shape(value: object) -> bool:
    """Return whether a value is a shape, which is a tuple but must stay one leaf."""
    return isinstance(value, _Shape)


def _is_cache(value: object) -> bool:
    """Return whether a value is a cache, which must stay one leaf.

    It would not, once an export has registered caches as pytrees for the rest of the process.
    """
    return isinstance(value, Cache)


def _shape(leaf: object) -> _Shape:
    """Return the shape of a leaf; anything but a tensor has no axes."""
    return _Shape(leaf.shape) if isinstance(leaf, torch.Tensor) else _Shape()


def _extended(name: str, value: Any, lengths: set[int], more: int) -> Any:
    """Return an input for a prompt that is longer by `more` tokens; only its shape matters."""
    if not isinstance(value, (torch.Tensor, Cache)):
        return value
    if isinstance(value, Cache):
        # Case: a cache. A run adds to the one that it is given, so it gets a copy, without values.
        held = [tensor for layer in value.layers for tensor in tensors_of(layer)]
        return copy.deepcopy(value, {id(tensor): _like(tensor) for tensor in held})
    if name == "attention_mask" and value.ndim == 4:
        # Queries and keys.
        return torch.nn.functional.pad(value, (0, more, 0, more))
    # Floats other than positions belong to images, whose sides may happen to be as long as the
    # prompt.
    of_prompt = name == "position_ids" or not value.is_floating_point()
    if value.ndim < 2 or value.shape[-1] not in lengths or not of_prompt:
        # Case: an input that has no value for each token.
        return value
    # Case: one with a value for each token.
    return torch.nn.functional.pad(value, (0, more))


def _changed_axis(short: _Shape, long: _Shape) -> int | None:
    """Return the axis whose length differs between the two runs, or None."""
    changed = [axis for axis, (a, b) in enumerate(zip(short, long, strict=True)) if a != b]
    if len(changed) > 1:
        raise CaptureError(
            f"The model's code makes a value of shape {tuple(short)} with a number for every pair "
            "of tokens, and what becomes of it when tokens are dropped is not known. Use a model "
            "whose layers are given masks and positions alone."
        )
    return changed[0] if changed else None
