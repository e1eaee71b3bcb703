"""Observe a block's attention through the seam, or bias it, as explicit values of the graph."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from deos_fx.attention.continued import ContinuedLayer
from deos_fx.attention.mask import attention_modules, biased_mask, is_causal
from deos_fx.attention.observation import Observation
from deos_fx.attention.seam import ObservedBlock, PeekedBlock
from deos_fx.models.upstream import CACHE
from deos_fx.passes.graph import attends
from deos_fx.passes.notes import annotate, note_of

__all__ = ["AskedNodes", "bias_block", "observe_attention", "peek_block"]

AskedNodes = tuple[fx.Node | None, fx.Node | None, fx.Node | None]
"""The nodes of `Asked`: positions of queries, their votes, and positions of the keys that count."""


def observe_attention(
    graph_module: fx.GraphModule,
    block: fx.Node,
    wanted: Sequence[tuple[Observation, AskedNodes | None]],
) -> tuple[list[fx.Node], fx.Node, fx.Node]:
    """Let a block's node also return observations of its attention.

    Args:
        graph_module: The graph. Changed in place.
        block: call_module node of a transformer block that does not observe anything yet.
        wanted: The observations, each with the nodes of its queries; None if it has none.

    Returns:
        The observed values, the node of the block's hidden states, and the first node after them
        (the one to insert before).
    """
    if not wanted:
        # Case: nothing to observe. The block stays as it is.
        return [], block, block.next
    graph = graph_module.graph
    observe = tuple(observation for observation, _ in wanted)
    # The node keeps its target, and the module there becomes a view.
    _use_seam(graph_module, block, observe)
    block.kwargs = {**block.kwargs, **_asked(wanted)}
    # From here on, the block's node is a tuple: its users read the first part.
    users = list(block.users)
    anchor = block.next
    with graph.inserting_before(anchor):
        hidden = _part(graph, block, 0, "hidden")
        # The hidden states take over the note of the block, except that they are no block.
        hidden.meta = dict(block.meta)
        annotate(hidden, block=None)
        seen = [_part(graph, block, i, item.kind) for i, item in enumerate(observe, start=1)]
    for user in users:
        user.replace_input_with(block, hidden)
    return seen, hidden, anchor


def peek_block(
    graph_module: fx.GraphModule,
    module: nn.Module,
    name: str,
    like: fx.Node,
    hidden: fx.Node,
    wanted: Sequence[tuple[Observation, AskedNodes | None]],
) -> list[fx.Node]:
    """Observe the attention of a block on some hidden states, without running the rest of it.

    Args:
        graph_module: The graph. Changed in place, at the current place of insertion.
        module: The block; it need not be in the graph.
        name: Name of the new node and its module.
        like: The call_module node whose other arguments it gets.
        hidden: The hidden states [B, N, d].
        wanted: The observations, each with the nodes of its queries; None if it has none.

    Returns:
        The observed values.
    """
    observe = tuple(observation for observation, _ in wanted)
    graph_module.add_submodule(name, PeekedBlock(module, observe))
    # The cache gets the keys of a block when the block runs, not when it is peeked into; only one
    # of a later turn is read. And the queries that `like` is asked for are not those of the peek.
    left_out = ("asked",) if isinstance(module, ContinuedLayer) else ("asked", CACHE)
    kwargs = {key: value for key, value in like.kwargs.items() if key not in left_out}
    graph = graph_module.graph
    # The first argument of a block is the hidden states.
    arguments = (hidden, *like.args[1:]), {**kwargs, **_asked(wanted)}
    peek = graph.create_node("call_module", name, *arguments, name)
    return [_part(graph, peek, i, item.kind) for i, item in enumerate(observe)]


def bias_block(
    graph_module: fx.GraphModule, block: fx.Node, key_bias: fx.Node | None, hidden: fx.Node
) -> None:
    """Add a bias to the attention logits of one block, as part of its mask.

    The blocks of a token space have one bias, which takes the place of an earlier one. Those with
    the same mask share one node for the sum of the two.

    Args:
        graph_module: The graph. Changed in place.
        block: call_module node of a transformer block.
        key_bias: Node of the bias [B, N]; None removes an earlier bias.
        hidden: Node of hidden states [B, Q, d] of the block's token space, of which only the shape,
            precision and device are read.

    Raises:
        ValueError: If the block takes no attention mask.
    """
    module = graph_module.get_submodule(str(block.target))
    # The signature that counts is that of the model's own block.
    if isinstance(module, ObservedBlock):
        module = module.original()
    place = _place_of_mask(module, block)
    if place is None:
        # Case: a block without a mask. If no bias is to be added, there is none to remove either.
        if key_bias is None:
            return
        raise ValueError(
            f"{block.name} ({type(module).__name__}) takes no attention_mask, so its attention "
            "cannot be biased. Use mass_bias=0 there."
        )
    if not attends(block):
        # Case: a convolution, for instance. There is no attention to bias.
        return
    mask = block.args[place] if isinstance(place, int) else block.kwargs.get(place)
    mask = _without_bias(mask)
    if key_bias is not None:
        mask = _with_bias(graph_module, mask, key_bias, hidden, module)
    if isinstance(place, int):
        block.update_arg(place, mask)
    else:
        block.update_kwarg(place, mask)


def _asked(
    wanted: Sequence[tuple[Observation, AskedNodes | None]],
) -> dict[str, tuple[AskedNodes, ...]]:
    """Return the keyword argument with the queries of all observations that have some."""
    asked = tuple(nodes for _, nodes in wanted if nodes is not None)
    return {"asked": asked} if asked else {}


def _part(graph: fx.Graph, block: fx.Node, i: int, name: str) -> fx.Node:
    """Emit a node of one of a block's outputs, named after the block."""
    args = (block, i)
    return graph.create_node("call_function", operator.getitem, args, {}, f"{block.name}_{name}")


def _place_of_mask(module: nn.Module, block: fx.Node) -> int | str | None:
    """Return the position or the name of a block's mask argument; None if it takes no mask."""
    # mypy takes a class with a __hash__ of its instances for one that cannot be hashed itself.
    kind: Any = type(module)
    parameters = _parameters(module.forward) if "forward" in vars(module) else _of_class(kind)
    name = "attention_mask"
    if name in parameters and parameters.index(name) < len(block.args):
        # Case: by position.
        return parameters.index(name)
    # Case: by keyword, perhaps one that the signature takes as **kwargs.
    return name if name in parameters or name in block.kwargs else None


def _parameters(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of a bound forward."""
    return list(inspect.signature(forward).parameters)


@functools.lru_cache
def _of_class(kind: type[nn.Module]) -> list[str]:
    """Return the names of the parameters of a class's forward: blocks are asked for every space."""
    return _parameters(kind.forward)[1:]


def _without_bias(mask: Any) -> Any:
    """Return a mask before an earlier bias was added."""
    if not isinstance(mask, fx.Node):
        return mask
    # biased_mask(mask, key_bias, hidden, causal)
    return mask.args[0] if mask.target is biased_mask else mask


def _with_bias(
    graph_module: fx.GraphModule, mask: Any, key_bias: fx.Node, hidden: fx.Node, module: nn.Module
) -> fx.Node:
    """Return a node of the mask with the bias: the one of an earlier block, or a new one."""
    for user in key_bias.users:
        # The node of an earlier block stands before this one.
        if user.target is biased_mask and user.args[0] is mask:
            return user
    graph = key_bias.graph
    made_of = [node for node in (mask, key_bias, hidden) if isinstance(node, fx.Node)]
    # As soon as it can be made: a peek into the block stands before what the block reads.
    with graph.inserting_before(max(made_of).next):
        # Attention that names no implementation adds the mask that it is given.
        adds = not attention_modules(module) and _is_added(graph_module, mask)
        causal = adds or is_causal(module)
        node = graph.call_function(biased_mask, (mask, key_bias, hidden, causal))
    if isinstance(mask, fx.Node):
        annotate(node, axes=note_of(mask).axes)
    return node


def _is_added(graph_module: fx.GraphModule, mask: Any) -> bool:
    """Return whether a mask is made to be added to logits by the model's own code."""
    while isinstance(mask, fx.Node) and mask.op == "call_function":
        # Case: re-indexed, or taken out of a dict of masks.
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or mask.op != "call_module":
        return False
    config: Any = getattr(graph_module.get_submodule(str(mask.target)), "config", None)
    return config is not None and config.get_text_config()._attn_implementation == "eager"


def _use_seam(
    graph_module: fx.GraphModule, block: fx.Node, observe: tuple[Observation, ...]
) -> None:
    """Replace a block's module by a view of it that goes through the seam."""
    module = graph_module.get_submodule(str(block.target))
    if isinstance(module, ObservedBlock):
        raise AssertionError(f"{block.name} is observed twice")
    graph_module.set_submodule(str(block.target), ObservedBlock(module, observe))
