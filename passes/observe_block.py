"""Route a block's attention through the seam: observe it or bias it, as explicit graph values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from deos_fx import tokens
from deos_fx.seam import ObservedBlock

__all__ = ["Observations", "bias_block", "observe_block", "observe_class_token"]


@dataclass
class Observations:
    """Nodes of what a block reports; asking for something not observed is a bug.

    Attributes:
        last: Node of [B, 1, N] attention rows of the first query set (the last token, or CLS).
        text: Node of the positions [B, T] of the second query set.
        rows: Node of [B, T, N] attention rows of the second query set.
        key: Node of [B, N, D] keys.
    """

    last: fx.Node | None = None
    text: fx.Node | None = None
    rows: fx.Node | None = None
    key: fx.Node | None = None


def observe_block(
    graph_module: fx.GraphModule,
    block: fx.Node,
    last: fx.Node | None,
    text: fx.Node | None,
    *,
    keys: bool,
) -> tuple[Observations, fx.Node, fx.Node]:
    """Let a block's node return what its attention saw.

    Args:
        graph_module: The graph. Changed in place.
        block: call_module node of a transformer block.
        last: Node of query positions [B, 1] whose rows are wanted, or None.
        text: Node of further query positions [B, T], or None.
        keys: Whether the keys are wanted.

    Returns:
        The observations, the node of the block's hidden states, and the first node behind them
        (where to insert).
    """
    graph = graph_module.graph
    observe = (("rows",) if last or text else ()) + (("keys",) if keys else ())
    if not observe:
        return Observations(), block, block.next
    _use_seam(graph_module, block, observe)
    queries = last or text
    if last and text:
        with graph.inserting_before(block):
            queries = graph.call_function(torch.cat, ([last, text], 1))
    if queries:
        block.kwargs = {**block.kwargs, "queries": queries}
    users = list(block.users)
    anchor = block.next
    with graph.inserting_before(anchor):
        hidden = _part(graph, block, 0, "hidden")
        hidden.meta = dict(block.meta)
        parts = {name: _part(graph, block, i, name) for i, name in enumerate(observe, start=1)}
        seen = Observations(text=text, key=parts.get("keys"))
        rows = parts.get("rows")
        if last and text:
            first, rest = (slice(None), slice(0, 1)), (slice(None), slice(1, None))
            seen.last = graph.call_function(operator.getitem, (rows, first))
            seen.rows = graph.call_function(operator.getitem, (rows, rest))
        else:
            seen.last, seen.rows = (rows, None) if last else (None, rows)
    for user in users:
        user.replace_input_with(block, hidden)
    return seen, hidden, anchor


def observe_class_token(
    graph_module: fx.GraphModule,
    block: fx.Node,
    class_tokens: int,
    call: Callable[..., fx.Node],
) -> fx.Node:
    """Let a vision block report the attention of its CLS token.

    Args:
        graph_module: The graph. Changed in place.
        block: call_module node of the block.
        class_tokens: Tokens in front of the patches.
        call: Emits a call_function node at the place of insertion.

    Returns:
        Node of [I, V].
    """
    with graph_module.graph.inserting_before(block):
        query = call(tokens.class_token, block.args[0])
    seen, _, anchor = observe_block(graph_module, block, query, None, keys=False)
    with graph_module.graph.inserting_before(anchor):
        return call(tokens.attention_to_patches, seen.last, class_tokens)


def _part(graph: fx.Graph, block: fx.Node, i: int, name: str) -> fx.Node:
    """One of a block's outputs, named after the block."""
    args = (block, i)
    return graph.create_node("call_function", operator.getitem, args, {}, f"{block.name}_{name}")


def bias_block(graph_module: fx.GraphModule, block: fx.Node, key_bias: fx.Node | None) -> None:
    """Add a bias to the attention logits of one block.

    Args:
        graph_module: The graph. Changed in place.
        block: call_module node of a transformer block.
        key_bias: Node of [B, N]; None takes an earlier bias away.
    """
    kwargs = {name: value for name, value in block.kwargs.items() if name != "key_bias"}
    if key_bias is not None:
        module = graph_module.get_submodule(str(block.target))
        if not isinstance(module, ObservedBlock):
            _use_seam(graph_module, block, ())
        kwargs["key_bias"] = key_bias
    block.kwargs = kwargs


def _use_seam(graph_module: fx.GraphModule, block: fx.Node, observe: tuple[str, ...]) -> None:
    """Replace the block by a view of it that goes through the seam."""
    module = graph_module.get_submodule(str(block.target))
    if isinstance(module, ObservedBlock):
        module = module.original()
    graph_module.set_submodule(str(block.target), ObservedBlock(module, observe))
