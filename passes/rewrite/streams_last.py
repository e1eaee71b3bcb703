"""Put the streams of hidden states behind the tokens, where a model's code has them in front."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from deos_fx.models.views import with_forward
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.notes import annotate, annotate_graph, note_of, note_of_graph

__all__ = ["streams_last"]

# Of hidden states [s, B, N, d].
_TOKENS = 2


def streams_last(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Let decoder layers take and give hidden states [B, N, s, d] in place of [s, B, N, d].

    Gemma 3n keeps several hidden states of each token, stacked in front of the batch. Reductions
    know streams behind the tokens. Only views change: every layer computes what it did.

    Args:
        graph_module: A captured, annotated graph. Changed in place.

    Returns:
        The same graph module.
    """
    graph, note = graph_module.graph, note_of_graph(graph_module)
    layers = blocks_of(graph, "decoder").values()
    # In the order of the graph.
    found = {node: None for node in layers if note_of(node).axes == _TOKENS}
    if not found:
        return graph_module
    for node in found:
        given: Any = node.args[0]
        if given not in found:
            with graph.inserting_before(node):
                node.replace_input_with(given, _moved(graph, given, 0, _TOKENS))
        others = [user for user in node.users if user not in found]
        with graph.inserting_after(node):
            back = _moved(graph, node, _TOKENS, 0)
        for user in others:
            user.replace_input_with(node, back)
        layer = _of_streams_last(graph_module.get_submodule(str(node.target)))
        graph_module.set_submodule(str(node.target), layer)
        annotate(node, axes=1, shape=_shape(note_of(node).shape, 0, _TOKENS))
    # A peek into a layer finds it by its block.
    blocks = {
        block: _of_streams_last(layer) if block.stage == "decoder" else layer
        for block, layer in note.blocks.items()
    }
    annotate_graph(graph_module, replace(note, blocks=blocks))
    return finish(graph_module)


def _moved(graph: fx.Graph, value: fx.Node, source: int, target: int) -> fx.Node:
    """Emit a view of hidden states, annotated like them."""
    node = graph.call_function(torch.movedim, (value, source, target))
    note = note_of(value)
    axes = 1 if target == _TOKENS else _TOKENS
    shape = _shape(note.shape, source, target)
    annotate(node, axes=axes, shape=shape, dtype=note.dtype, content=note.content)
    return node


def _shape(shape: Any, source: int, target: int) -> Any:
    """Return a shape with an axis at another place."""
    sizes = list(shape)
    sizes.insert(target, sizes.pop(source))
    return type(shape)(sizes)


def _of_streams_last(layer: nn.Module) -> nn.Module:
    """Return a view of a layer that takes and gives streams behind the tokens."""

    def around(forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden.movedim(_TOKENS, 0), *args, **kwargs)
        if isinstance(output, tuple):
            # Case: hidden states, and None or what is handed on.
            return (output[0].movedim(0, _TOKENS), *output[1:])
        return output.movedim(0, _TOKENS)

    return with_forward(layer, around)
