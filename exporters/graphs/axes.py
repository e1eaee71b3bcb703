"""Rename the dynamic axes of an exported graph, and drop metadata that nothing needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["forget_sources", "name_axes"]


def name_axes(graph: onnx_ir.Graph, shapes: Mapping[str, Any]) -> None:
    """Replace the exporter's symbols (``s43``) by the names of the dynamic axes (``batch``).

    Args:
        graph: The exported graph. Changed in place.
        shapes: Dynamic axes of every input, nested like the inputs: axis -> `torch.export.Dim`.
    """
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
    """Drop the notes on the Python line each node comes from: they are larger than the graph."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _axes(value: onnx_ir.Value) -> list[int | str | None]:
    """Return each axis: a length, an expression of symbols (``2*s43``), or None if unknown."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def _renamed(axis: str, names: Mapping[str, str]) -> str:
    """Rename the symbols in the expression of an axis."""
    return re.sub(r"[^\W\d]\w*", lambda found: names.get(found[0], found[0]), axis)


def _leaves(shapes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[int, Any]]]:
    """Yield every input's dynamic axes with its name in the graph (``past_key_values.0.key``)."""
    for name, axes in shapes.items():
        # Keys are axes at a tensor, and names at a dict of tensors.
        if all(isinstance(axis, int) for axis in axes):
            yield prefix + name, axes
        else:
            yield from _leaves(axes, f"{prefix}{name}.")
