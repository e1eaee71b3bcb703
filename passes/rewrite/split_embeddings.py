"""Split a graph where the prompt enters the decoder: what makes its embeddings, and the layers."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import blocks_of, made_of, reached
from deos_fx.passes.notes import note_of

__all__ = ["EMBEDDINGS", "decoder_of", "embeddings_of", "goes_around"]

EMBEDDINGS = "inputs_embeds"
"""Name of the hidden states that enter the decoder: output of one part, input of the other."""


def embeddings_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return the part of a graph before its first decoder layer.

    Args:
        graph_module: A captured or lowered graph. Not changed. Its guards are left out.

    Returns:
        A graph with the same inputs, which returns a dict: ``inputs_embeds`` [B, N, d] and, in a
        lowered graph, ``spaces`` as the whole does.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    entering = _entering(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            fields = {EMBEDDINGS: entering, "spaces": node.args[0].get("spaces", ())}
            graph.output(fx.node.map_arg(fields, copies.__getitem__))
        elif node.target is not check_guard:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return finish(fx.GraphModule(graph_module, graph, "Embeddings"))


def decoder_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return the part of a graph from its first decoder layer on.

    Masks, positions and whatever else is not made of hidden states is computed in it.

    Args:
        graph_module: A captured graph, or a lowered one of a decode step. Not changed. Its guards
            are left out.

    Returns:
        A graph with the further input ``inputs_embeds`` [B, N, d], and the output of the whole.

    Raises:
        ValueError: If a later layer reads earlier hidden states.
    """
    entering = _entering(graph_module)
    # Hidden states on their way to the decoder: what modules return, and what is made of it.
    before = made_of(entering)
    before &= reached(node for node in before if node.op == "call_module")
    graph = fx.Graph()
    given = graph.placeholder(EMBEDDINGS)
    copies = {entering: given}
    for node in graph_module.graph.nodes:
        if node in before:
            if note_of(node).shape == note_of(entering).shape:
                # Masks and rotary tables read the shape and dtype of any of them.
                copies[node] = given
        elif node.target is not check_guard:
            missing = [value for value in node.all_input_nodes if value not in copies]
            if missing:
                raise ValueError(
                    f"{node.name} reads {missing[0].name}, which is made before the decoder: the "
                    "layers take more than hidden states"
                )
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return finish(fx.GraphModule(graph_module, graph, "Decoder"))


def goes_around(graph_module: fx.GraphModule, names: Collection[str]) -> bool:
    """Return whether decoder layers read inputs in another way than by their hidden states.

    Features of several depths (DeepStack) are added to hidden states inside the decoder.

    Args:
        graph_module: A captured graph, without reductions: these choose by what the inputs contain.
        names: Names of the inputs.
    """
    graph, entering = graph_module.graph, _entering(graph_module)
    stack = [node for node in graph.find_nodes(op="placeholder") if node.target in names]
    found = {entering}
    while stack:
        node = stack.pop()
        # Masks and rotary tables read the shape of hidden states.
        of_shape = node.op == "call_module" and not note_of(node).content
        if node not in found and not of_shape:
            found.add(node)
            stack.extend(node.users)
    return not found.isdisjoint(blocks_of(graph, "decoder").values())


def _entering(graph_module: fx.GraphModule) -> fx.Node:
    """Return the hidden states [B, N, d] that the first decoder layer reads."""
    layers = blocks_of(graph_module.graph, "decoder")
    return layers[min(layers)].all_input_nodes[0]
