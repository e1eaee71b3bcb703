"""Turn guards on the contents of tensors into outputs, where no Python runs beside a graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.notes import note_of

__all__ = ["return_guards"]


def return_guards(graph_module: fx.GraphModule) -> tuple[bool | float, ...]:
    """Let a graph return what its guards read of tensors, for the caller to compare.

    A model may branch on its inputs (``if mask.any():``), and a graph holds one of the branches.
    Guards on sizes stay: whoever traces the graph with dynamic axes evaluates them.

    Args:
        graph_module: A captured or lowered graph that returns a dict. Changed in place: it gains
            the field ``guards``, a list of tensors [], if there are any such guards.

    Returns:
        The values for which the graph holds, in the order of the list.
    """
    graph = graph_module.graph
    read: list[Any] = []
    expected: list[Any] = []
    for guard in graph.find_nodes(op="call_function", target=check_guard):
        if note_of(guard).reads:
            value, seen = guard.args
            read.append(value)
            expected.append(seen)
            graph.erase_node(guard)
    if read:
        output = graph.output_node()
        fields: Any = output.args[0]
        output.args = ({**fields, "guards": read},)
        finish(graph_module)
    return tuple(expected)
