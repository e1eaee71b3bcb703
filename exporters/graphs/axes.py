"""Names of axes, and notes that an export needs no more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["forget_sources", "name_axes"]


def name_axes(graph: onnx_ir.Graph, shapes: Mapping[str, Any]) -> None:
    """Call dynamic axes what they are (``batch``), not by the exporter's symbols (``s43``)."""
    import onnx_ir

    axes = dict(_leaves(shapes))
    names = {
        str(symbol): dim.__name__
        for value in graph.inputs
        for axis, symbol in enumerate(_axes(value))
        if (dim := axes[str(value.name)].get(axis)) is not None
    }
    nodes = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *nodes):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                _renamed(axis, names) if isinstance(axis, str) else axis for axis in _axes(value)
            )


def forget_sources(graph: onnx_ir.Graph) -> None:
    """Drop the notes on which line of Python a node comes from: larger than the graph itself."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _axes(value: onnx_ir.Value) -> list[int | str | None]:
    """The axes of a value: a length, an expression of symbols (``2*s43``), or None if unknown."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def _renamed(axis: str, names: Mapping[str, str]) -> str:
    """An axis with its symbols renamed."""
    return re.sub(r"[^\W\d]\w*", lambda found: names.get(found[0], found[0]), axis)


def _leaves(shapes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[int, Any]]]:
    """Dynamic axes of every input by its name in the graph (``past_key_values.0.key``)."""
    for name, axes in shapes.items():
        if all(isinstance(axis, int) for axis in axes):
            yield prefix + name, axes
        else:
            yield from _leaves(axes, f"{prefix}{name}.")
