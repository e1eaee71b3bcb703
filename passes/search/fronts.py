"""What comes before the first reduction, computed once for every batch.

Policies that begin at one place and observe the same begin with the same computation: the tower,
and decoder layers. It is most of what a forward pass of a short sequence costs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from deos_fx.attention.seam import ObservedBlock
from deos_fx.passes.pipeline import run_graph
from deos_fx.passes.search import processes

__all__ = ["Fronts", "Parts"]

Parts = tuple[fx.GraphModule, fx.GraphModule]
"""The two parts of a graph, as ``split_prefix`` returns them."""

# Bytes that are kept; the values used least recently make room for others.
_MOST_BYTES = 4 << 30


class Fronts:
    """Values of the first parts of graphs, shared by all graphs that begin alike."""

    def __init__(self) -> None:
        # The first part and the batch are kept as well: their identities are parts of the key.
        self._known: OrderedDict[Hashable, tuple[object, object, dict[str, Any]]] = OrderedDict()
        self._bytes = 0

    def clear(self) -> None:
        """Forget all values."""
        self._known.clear()
        self._bytes = 0

    def run(
        self, parts: Parts, batch: object, inputs: Mapping[str, Any], *, in_step: bool = False
    ) -> dict[str, Any]:
        """Run both parts of a graph, the first only if no graph that begins alike was run.

        Args:
            parts: The parts.
            batch: What tells one batch from another, by identity.
            inputs: The inputs of the graph.
            in_step: Whether processes share the weights: all run the first part if one has to.

        Returns:
            The fields of its output.
        """
        front, rest = parts
        key = id(batch), _identity(front)
        missing = key not in self._known
        if processes.any_has(missing) if in_step else missing:
            with torch.no_grad():
                values = run_graph(front, dict(inputs))
        if missing:
            self._known[key] = front, batch, values
            self._bytes += _bytes(values)
            while self._bytes > _MOST_BYTES and len(self._known) > 1:
                *_, dropped = self._known.popitem(last=False)[1]
                self._bytes -= _bytes(dropped)
        self._known.move_to_end(key)
        return run_graph(rest, {**inputs, **self._known[key][-1]})


def _identity(front: fx.GraphModule) -> Hashable:
    """Return what is equal for graphs that compute the same: code, modules and constants."""
    modules = []
    for node in front.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            owner, _, name = str(node.target).rpartition(".")
            module = getattr(front.get_submodule(owner), name)
            seen = isinstance(module, ObservedBlock)
            # A view of a block is made anew for every graph; what counts is what it shows.
            modules.append((id(module.original()), module.observe) if seen else id(module))
    return front.code, tuple(modules)


def _bytes(values: Mapping[str, Any]) -> int:
    leaves = _pytree.tree_leaves(dict(values))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
