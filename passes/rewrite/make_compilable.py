"""Leave out of a graph what torch.compile cannot trace."""

from __future__ import annotations

from typing import Any

from torch import fx
from transformers.utils.output_capturing import _active_collector

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish

__all__ = ["begin_unrecorded", "end_unrecorded", "make_compilable"]


def make_compilable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop guards, which read values into Python, and let nothing be recorded.

    transformers hangs hooks on the layers of a model that record hidden states when they are asked
    to. A hook that is idle still asks a ContextVar, which torch.compile cannot trace unless the
    recording was set while it traced. What a graph records is among its outputs.

    Args:
        graph_module: A lowered graph, whose guards have to be run on their own. Changed in place.

    Returns:
        The same graph module.
    """
    graph = graph_module.graph
    for guard in graph.find_nodes(op="call_function", target=check_guard):
        graph.erase_node(guard)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        before = graph.call_function(begin_unrecorded)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(end_unrecorded, (before,))
    return finish(graph_module)


@fx.node.has_side_effect
def begin_unrecorded() -> Any:
    """Record nothing from here on; return what `end_unrecorded` takes."""
    return _active_collector.set(None)


@fx.node.has_side_effect
def end_unrecorded(before: Any) -> None:
    """Record again what was recorded before."""
    _active_collector.reset(before)
