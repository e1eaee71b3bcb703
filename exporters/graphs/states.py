"""Pass a cache through a graph as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from deos_fx.models.upstream import CACHE
from deos_fx.tokens.cache import ReducedCache

__all__ = ["filled", "inputs_of", "states_of"]


def inputs_of(lowered: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Return the names of the inputs that a graph reads and of those that it ignores.

    The cache is in neither list.
    """
    nodes = lowered.graph.find_nodes(op="placeholder")
    given = [node for node in nodes if node.target != CACHE]
    return (
        [str(node.target) for node in given if node.users],
        [str(node.target) for node in given if not node.users],
    )


def states_of(cache: ReducedCache) -> dict[str, dict[str, Tensor]]:
    """Return keys and values of every layer, by layer and name."""
    layers: list[Any] = cache.layers
    return {
        str(layer): {"key": held.keys, "value": held.values} for layer, held in enumerate(layers)
    }


def filled(cache: ReducedCache, states: Mapping[str, Mapping[str, Tensor]]) -> ReducedCache:
    """Put keys and values of every layer into a cache, and return the cache."""
    for layer, held in states.items():
        cache.update(held["key"], held["value"], int(layer))
    return cache
