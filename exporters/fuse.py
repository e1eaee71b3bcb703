"""Fuse exported graphs into ONNX Runtime's own operators, by transformers' fusions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deos_fx.exporters.graphs.exact import exact_constants
from deos_fx.exporters.graphs.exportable import without_noise
from deos_fx.exporters.graphs.in_place import write_in_place
from deos_fx.exporters.graphs.quick import quick_rules

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["DEVICES", "fuse", "of_one"]

DEVICES = ("cpu", "cuda")
"""Devices that graphs can be fused for: operators that are fast on one are slow on the other."""


def fuse(programs: Mapping[str, onnx_ir.Model], device: str) -> None:
    """Fuse norms, attention, rotary embeddings and activations, and let caches be written in place.

    Args:
        programs: Name -> graph. Changed in place.
        device: One of `DEVICES`.
    """
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    for name, program in programs.items():
        # For the CPU, transformers makes a GroupQueryAttention of attention over a prompt. That is
        # always causal, and takes the positions of the first row for all rows (ONNX Runtime 1.31),
        # but images may see themselves in both directions, and after a reduction every row has its
        # own positions. What it makes for CUDA is right, and as fast on the CPU.
        with without_noise(), exact_constants(), quick_rules():
            fuse_for_onnxruntime(program, "cuda" if name == "prefill" else device)
        _register_constants(program.graph)
        if name == "decode" and device == "cpu":
            write_in_place(program)


def _register_constants(graph: onnx_ir.Graph) -> None:
    """Register constants that nodes read though the graph does not have them.

    onnxscript's fusions (0.7) leave such ones where attention shares a shape, as in Idefics2.
    """
    for node in graph.all_nodes():
        for i, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            known = graph.initializers.setdefault(str(value.name), value)
            if known is not value:
                node.replace_input_with(i, known)


def of_one(program: onnx_ir.Model, axis: str) -> onnx_ir.Model:
    """Return a graph for a single new token or row, made of one for any number.

    ONNX Runtime's fused attention takes a cache and one new token of each row, or several of a
    single row. So generation gets a graph of its own, without tracing the model once more.

    Args:
        program: The graph for any number of tokens and rows.
        axis: The name of the axis that is to have the length 1.

    Returns:
        A copy that shares the weights.
    """
    import onnx_ir

    single = program.clone()
    nodes = (value for node in single.graph.all_nodes() for value in node.outputs)
    for value in (*single.graph.inputs, *nodes):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = onnx_ir.Shape([_length(dim, axis) for dim in dims])
    return single


def _length(dim: int | str | None, axis: str) -> int | str | None:
    """Return the length of an axis: a number, or an expression (``new + past``)."""
    if not isinstance(dim, str):
        return dim
    found = re.sub(rf"\b{axis}\b", "1", dim)
    return int(found) if found.isdigit() else found
