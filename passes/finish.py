"""The one place where a changed graph is cleaned, checked and recompiled."""

from __future__ import annotations

from torch import fx

__all__ = ["finish"]


def finish(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and unused submodules, lint, recompile.

    Every pass ends with this call and none does these steps itself.

    Args:
        graph_module: The graph a pass has just changed. Changed in place.

    Returns:
        The same graph module.

    Raises:
        RuntimeError: If the graph is malformed (a bug in the pass).
    """
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module
