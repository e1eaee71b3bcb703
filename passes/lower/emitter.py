"""Emit the nodes of a reduction, under names that a reader of the printed graph understands."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx import tokens
from deos_fx.models.views import execution_device
from deos_fx.passes.notes import annotate, annotate_graph, note_of, note_of_graph

__all__ = ["Emitter"]


class Emitter:
    """Emits nodes at the graph's current place of insertion.

    Args:
        graph_module: The graph. Changed in place.

    Attributes:
        site: Name of the site; empty before the first one.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.site = ""

    @property
    def suffix(self) -> str:
        """Return the suffix of nodes' names: ``decoder2``, since fx takes ``_2`` for a counter."""
        return self.site.replace(".", "")

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Emit a call_function node, named after its function and the site.

        A call on constants alone (anchors on the grid) is computed at once.

        Args:
            function: The function.
            *args: Its arguments: nodes, tensors (which become buffers of the graph) or constants.

        Returns:
            The node, or the value of a call on constants.
        """
        if not _has_node(args):
            # Case: constants alone, such as the grid. There is nothing to emit.
            return function(*args)
        # Tensors beside nodes become buffers. The name is what a reader sees in the printed graph.
        args = pytree.tree_map_only(torch.Tensor, self.constant, args)
        name = f"{function.__name__}_{self.suffix}" if self.suffix else function.__name__
        return self.graph.create_node("call_function", function, args, {}, name)

    def call_beside(self, visual: fx.Node, function: Callable[..., Any], *args: Any) -> Any:
        """Emit a call like `call`, after moving every argument to the device of some tokens.

        Masses, grids and votes may be on the device of earlier layers or of the inputs.

        Args:
            visual: The tokens.
            function: The function.
            *args: Its arguments.

        Returns:
            The node, or the value of a call on constants.
        """
        if not _has_node(args):
            # Case: constants alone, as in `call`.
            return function(*args)
        moved = partial(self.call, tokens.beside)
        kinds = (fx.Node, torch.Tensor)
        return self.call(
            function, *pytree.tree_map_only(kinds, lambda value: moved(value, visual), args)
        )

    def constant(self, value: torch.Tensor) -> fx.Node:
        """Store a constant as a buffer of the graph, which moves between devices with it."""
        names = (f"constant_{self.suffix}_{i}" for i in itertools.count())
        name = next(name for name in names if not hasattr(self.graph_module, name))
        # A buffer made in inference mode could not be used in a search, which needs gradients.
        with torch.inference_mode(False):
            constant = value.to(execution_device(self.graph_module), copy=True)
        self.graph_module.register_buffer(name, constant, persistent=False)
        return self.graph.get_attr(name)

    def explain(self, role: str, value: fx.Node | torch.Tensor | None) -> None:
        """Mark a value for `ReducedModel.explain`, under the site and a role.

        Args:
            role: The role.
            value: A node or a constant; None if a reduction has no such value.
        """
        # Under the site and not under a node's name, which may change.
        key = self.site, role
        if isinstance(value, fx.Node):
            # Case: a node. Its value is read when the graph runs.
            annotate(value, explains=(*note_of(value).explains, key))
        elif value is not None:
            note = note_of_graph(self.graph_module)
            explains = {**note.explains, key: value}
            annotate_graph(self.graph_module, replace(note, explains=explains))


def _has_node(args: object) -> bool:
    """Return whether there is a node anywhere in nested arguments."""
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(args))
