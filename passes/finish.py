"""The one place where a changed graph is cleaned, checked and recompiled."""

from __future__ import annotations

import linecache
import weakref

from torch import fx
from torch.fx.graph_module import _loader

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
    _forget(_source_of(graph_module))
    graph_module.recompile()
    if graph_module in _FORGETTING:
        _FORGETTING[graph_module].detach()
    _FORGETTING[graph_module] = weakref.finalize(graph_module, _forget, _source_of(graph_module))
    return graph_module


# *** torch.fx keeps the source of every graph it has ever compiled, for tracebacks ***

_FORGETTING: weakref.WeakKeyDictionary[fx.GraphModule, weakref.finalize[..., fx.GraphModule]]
_FORGETTING = weakref.WeakKeyDictionary()


def _source_of(graph_module: fx.GraphModule) -> str:
    """The name that torch.fx gave to the file that its code is in."""
    return type(graph_module).forward.__code__.co_filename


def _forget(source: str) -> None:
    _loader.eval_cache.pop(source, None)
    linecache.cache.pop(source, None)
