"""Layers that rotate the keys they hold anew in every call, and so need the angles of all of them.

In the model's own code, the list of all positions so far is kept in the cache, beside the index of
the first such layer, and all layers are given the angles of all of them. In a graph, the tokens
that a layer holds are its own: it is given the angles of new tokens, and keeps them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from deos_fx.models.upstream import CACHE
from deos_fx.models.views import with_forward

__all__ = ["ANGLES", "POSITIONS", "keeping_angles"]

POSITIONS = "indexer_position_ids"
"""Where a model's code keeps the positions of all tokens so far, in the cache of a layer."""

ANGLES = "position_embeddings"
"""Argument of a layer with cosines and sines."""


def keeping_angles(module: nn.Module, index: int) -> nn.Module:
    """Return a view of a layer that is given the angles of new tokens alone.

    Args:
        module: The layer.
        index: Its number.
    """

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if cache is not None:
            kwargs[ANGLES] = cache.angles.update(index, kwargs[ANGLES])
        return forward(*args, **kwargs)

    return with_forward(module, around)
