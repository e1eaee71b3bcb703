"""Clean, check and recompile a changed graph: the one place where this is done."""

from __future__ import annotations

import linecache
import weakref

from torch import fx
from torch.fx.graph_module import _loader

__all__ = ["finish"]


def finish(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and unused submodules, lint and recompile.

    Every pass that changes a graph ends with this call; no pass does these steps itself.

    Args:
        graph_module: The graph that a pass has just changed. Changed in place.

    Returns:
        The same graph module.

    Raises:
        RuntimeError: If the graph is malformed (a bug in the pass).
    """
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    # torch.fx never forgets the source of a graph, and a search compiles hundreds. So the old
    # source is removed now, and the new one when its graph module is freed.
    _forget(_source_of(graph_module))
    graph_module.recompile()
    # Its earlier finalizer would remove a source that is gone already.
    if graph_module in _FORGETTING:
        _FORGETTING[graph_module].detach()
    _FORGETTING[graph_module] = weakref.finalize(graph_module, _forget, _source_of(graph_module))
    return graph_module


# *** sources, which torch.fx keeps of every graph it has ever compiled, for tracebacks ***

# Graph module -> finalizer that removes its source.
_FORGETTING: weakref.WeakKeyDictionary[fx.GraphModule, weakref.finalize[..., fx.GraphModule]]
_FORGETTING = weakref.WeakKeyDictionary()


def _source_of(graph_module: fx.GraphModule) -> str:
    """Return the name of the file that torch.fx made up for the graph's code."""
    return type(graph_module).forward.__code__.co_filename


def _forget(source: str) -> None:
    """Remove a source from the caches of torch.fx and of Python."""
    _loader.eval_cache.pop(source, None)
    linecache.cache.pop(source, None)
