"""Fold ``torch.cat(list(x))`` back into one reshape.

Some model code iterates over a batch (``list(image_features)``) and concatenates the parts again.
Unrolled, that would fix the batch size in the graph.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.notes import note_of

__all__ = ["fold_unstack"]


def fold_unstack(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace unrolled iteration by a reshape, or guard its length.

    1. ``cat([x[0], ..., x[n-1]], dim=0)`` over all parts of ``x`` becomes ``x.flatten(0, 1)``, and
       with ``x[i].flatten(0, 1)`` as parts ``x.flatten(0, 2)``; the guard on ``len(x)`` that
       ``list`` left right after the iteration is removed.
    2. Any other unrolled iteration holds for this length only, which a guard checks at run time.

    Args:
        graph_module: A captured graph. Changed in place.

    Returns:
        The same graph module.
    """
    for node in list(graph_module.graph.nodes):
        if note_of(node).unrolled is not None and not _fold(graph_module.graph, node):
            _guard(graph_module.graph, node)
    return finish(graph_module)


def _fold(graph: fx.Graph, unbind: fx.Node) -> bool:
    """Apply rule 1 to an iteration, and return whether it applies."""
    # Every part must be used, and only in the concatenation.
    parts = [node for node in unbind.users if node.target is operator.getitem]
    if len(parts) != note_of(unbind).unrolled:
        return False
    flattened = [user for part in parts for user in part.users]
    depth = 1
    if len(flattened) == len(parts) and all(map(_flattens, flattened)):
        # Case: parts are flattened before they are concatenated.
        parts, depth = flattened, 2
    cats = {user for part in parts for user in part.users}
    if len(cats) != 1:
        return False
    (cat,) = cats
    # All parts, in their order, along axis 0.
    if cat.target is not torch.cat or cat.kwargs.get("dim", 0) != 0 or cat.args[0] != parts:
        return False
    stacked = unbind.args[0]
    with graph.inserting_before(cat):
        flat = graph.call_method("flatten", (stacked, 0, depth))
    cat.replace_all_uses_with(flat)
    # The reshape holds for any length, so the guard on it can go. `list` asks for the length right
    # after it starts to iterate.
    length = unbind.next
    if length.target is len and length.args == (stacked,):
        for guard in [user for user in length.users if user.target is check_guard]:
            graph.erase_node(guard)
    return True


def _flattens(node: fx.Node) -> bool:
    """Return whether a node is ``x.flatten(0, 1)``."""
    return node.target == "flatten" and node.args[1:] == (0, 1)


def _guard(graph: fx.Graph, unbind: fx.Node) -> None:
    """Apply rule 2 to an iteration."""
    # As a node of its own, since a guard compares a value with a constant.
    with graph.inserting_after(unbind):
        length = graph.call_function(len, (unbind,))
    with graph.inserting_after(length):
        graph.call_function(check_guard, (length, note_of(unbind).unrolled))
