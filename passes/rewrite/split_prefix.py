"""Split a graph where its first reduction begins: what comes before is computed once."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import made_of, reached
from deos_fx.passes.lower.insert_relaxed import RelaxedSite

__all__ = ["split_prefix"]


def split_prefix(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a relaxed or lowered graph in two: what no reduction changes, and the rest.

    The first part holds the modules of the model before the first reduction, and what these read.
    Cheap operators between the parts (masks, positions) are in the second, so that only hidden
    states and observations have to be stored between the two.

    Args:
        graph_module: A relaxed or lowered graph. Not changed.

    Returns:
        The first part, which returns a dict of the values that the second takes as inputs in
        addition to its own, and the second part.
    """
    graph = graph_module.graph
    changing = reached(node for node in graph.nodes if _reduces(graph_module, node))
    first: set[fx.Node] = set()
    for node in graph.nodes:
        # Guards are checked once; parts of what a module returns stay with the module.
        costly = node.op == "call_module" or node.target is check_guard
        part = node.target is operator.getitem and node.all_input_nodes[0] in first
        if node not in changing and (costly or part):
            first |= {node, *made_of(node)}
    inputs = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    read = {source for node in graph.nodes if node not in first for source in node.all_input_nodes}
    between = [node for node in graph.nodes if node in (first & read) - inputs]

    front, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in first or node.op == "placeholder":
            copies[node] = front.node_copy(node, copies.__getitem__)
    front.output({node.name: copies[node] for node in between})

    rest, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = rest.node_copy(node)
    for node in between:
        copies[node] = rest.placeholder(node.name)
    for node in graph.nodes:
        if node.op != "placeholder" and (node not in first or node.op == "get_attr"):
            copies[node] = rest.node_copy(node, copies.__getitem__)
    return tuple(_made(graph_module, part) for part in (front, rest))  # type: ignore[return-value]


def _reduces(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is part of a reduction: its module, or one of its operators."""
    if node.op == "call_module":
        # Case: a relaxed graph.
        return isinstance(graph_module.get_submodule(str(node.target)), RelaxedSite)
    # Case: a lowered graph.
    room = getattr(node.target, "__module__", None) or ""
    return room.startswith("deos_fx.operator")


def _made(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Make a graph module that shares the modules of another."""
    made: Any = fx.GraphModule(graph_module, graph, graph_module._get_name())
    return finish(made)
