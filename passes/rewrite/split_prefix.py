"""Split a graph where its first reduction begins: what comes before is computed once."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import made_of, reached
from deos_fx.passes.lower.insert_relaxed import RelaxedSite
from deos_fx.passes.lower.reduced_encoder import ReducedEncoder
from deos_fx.passes.notes import note_of

__all__ = ["split_prefix"]


def split_prefix(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a relaxed or lowered graph in two: what no reduction changes, and the rest.

    The first part holds the modules of the model before the first reduction, and what these read.
    Cheap values that the second part reads (masks, positions) are computed again in it, so that
    only hidden states and observations have to be stored between the two.

    Args:
        graph_module: A relaxed or lowered graph. Not changed.

    Returns:
        The first part, which returns a dict of the values that the second takes as inputs in
        addition to its own, and the second part.
    """
    graph = graph_module.graph
    changing = reached(node for node in graph.nodes if _reduces(graph_module, node))
    # What is worth storing: what modules return. A mask is cheap, and large.
    stored: set[fx.Node] = set()
    first: set[fx.Node] = set()
    for node in graph.nodes:
        costly = node.op == "call_module" and not note_of(node).is_mask
        part = node.target is operator.getitem and node.all_input_nodes[0] in stored
        if node not in changing and (costly or part):
            stored.add(node)
        # Guards are checked once.
        if node not in changing and (costly or part or node.target is check_guard):
            first |= made_of(node)
    # The second part, from back to front, down to what is stored.
    second, between = set[fx.Node](), set[fx.Node]()
    stack = [node for node in graph.nodes if node not in first]
    while stack:
        node = stack.pop()
        if node in stored:
            between.add(node)
        elif node not in second:
            second.add(node)
            stack.extend(node.all_input_nodes)
    return _part(graph_module, first, set(), between), _part(graph_module, second, between, set())


def _reduces(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is part of a reduction: its module, or one of its operators."""
    if node.op == "call_module":
        # Case: a relaxed graph, or groups of patches inside of an encoder.
        module = graph_module.get_submodule(str(node.target))
        return isinstance(module, (RelaxedSite, ReducedEncoder))
    # Case: a lowered graph.
    room = getattr(node.target, "__module__", None) or ""
    return room.startswith("deos_fx.operator")


def _part(
    graph_module: fx.GraphModule, nodes: set[fx.Node], given: set[fx.Node], asked: set[fx.Node]
) -> fx.GraphModule:
    """Make a graph module of some nodes, which shares the modules of the whole.

    Args:
        graph_module: The whole.
        nodes: The nodes; the inputs of the whole are added to them.
        given: Nodes whose values become further inputs, under their names.
        asked: Nodes whose values it returns, under their names; if empty, the output of the whole.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        copies[node] = graph.node_copy(node)
    for node in graph_module.graph.nodes:
        if node in given:
            copies[node] = graph.placeholder(node.name)
    for node in graph_module.graph.nodes:
        if node in nodes and node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if asked:
        # In the order of the graph, so that equal parts have equal code.
        ordered = [node for node in graph_module.graph.nodes if node in asked]
        graph.output({node.name: copies[node] for node in ordered})
    else:
        graph.node_copy(graph_module.graph.output_node(), copies.__getitem__)
    made: Any = fx.GraphModule(graph_module, graph, graph_module._get_name())
    return finish(made)
