"""Make the weights of exported graphs integers of 8 or 4 bits, by ONNX Runtime's own quantiser.

Every 32 weights of an output share a scale (and with 4 bits a zero point), which are in the dtype
of the model, as activations are. Embeddings and the weights that make logits have 8 bits in either
case: they suffer most, and where a model ties them, one copy still serves both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["WEIGHTS", "quantise", "quantiser"]

WEIGHTS = {"int8": 8, "int4": 4}
"""Types of weights that an export can have instead of the model's own -> bits."""

# Weights that share a scale. A matrix that is shorter than this, such as a learned score, stays as
# it is: it weighs nothing, and decides which tokens stay.
_BLOCK = 32
# On the CPU, products round activations to 8 bits in blocks of as many. With activations of float32
# they take twice as long for a new token with 4 bits and fifty times with 8, for which there is no
# such kernel. CUDA ignores it.
_ACCURACY = 4


def quantise(programs: Mapping[str, onnx_ir.Model], weights: str) -> None:
    """Replace products with constant matrices, and rows taken from them, by those of integers.

    What ONNX Runtime has fused into other operators keeps its weights, as the projections of
    attention in a vision tower, and so do convolutions.

    Args:
        programs: Name -> graph, fused. Changed in place.
        weights: A key of `WEIGHTS`.
    """
    tables = [node for program in programs.values() for node in _lookups(program)]
    # The largest table is that of the vocabulary.
    words = max((_constant(node, 0).shape[0] for node in tables), default=0)
    quantised = _Quantised()
    for program in programs.values():
        for node in _lookups(program):
            _replace(node, "GatherBlockQuantized", quantised.table(_constant(node, 0)))
        for node in _products(program):
            matrix = _constant(node, 1)
            if node.attributes.get_int("transB", 0):
                matrix = matrix.T
            bits = 8 if matrix.shape[1] == words else WEIGHTS[weights]
            _replace(node, "MatMulNBits", quantised.matrix(matrix, bits))
        _drop_unused(program.graph)
        program.graph.opset_imports["com.microsoft"] = 1


# *** finding ***


def _products(program: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the products of activations with a constant matrix, with or without a bias."""
    return [
        node
        for node in program.graph
        if node.op_type in ("MatMul", "Gemm")
        and _is_large(node.inputs[1])
        # A linear layer is no other Gemm.
        and not node.attributes.get_int("transA", 0)
        and all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    ]


def _lookups(program: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the nodes that take rows from a constant table by ids that are not constant."""
    return [
        node
        for node in program.graph
        if node.op_type == "Gather"
        and node.attributes.get_int("axis", 0) == 0
        and _is_large(node.inputs[0])
        # A row has no incomplete block.
        and _constant(node, 0).shape[1] % _BLOCK == 0
        and (ids := node.inputs[1]) is not None
        and ids.const_value is None
    ]


def _is_large(value: onnx_ir.Value | None) -> bool:
    """Return whether a value is a constant matrix of floats with a block along each axis."""
    if value is None or value.const_value is None:
        return False
    tensor = value.const_value
    return (
        len(tensor.shape) == 2
        and tensor.dtype.is_floating_point()
        and min(tensor.shape.numpy()) >= _BLOCK
    )


def _constant(node: onnx_ir.Node, place: int) -> np.ndarray:
    """Return a constant input of a node."""
    value: Any = node.inputs[place]
    return value.const_value.numpy()


# *** quantising ***


class _Quantised:
    """Matrices that have been quantised, each once for all graphs."""

    def __init__(self) -> None:
        # Hash of the matrix, and bits -> integers, scales and, with 4 bits, zero points.
        self._known: dict[tuple[bytes, int], list[np.ndarray]] = {}

    def matrix(self, matrix: np.ndarray, bits: int) -> tuple[list[np.ndarray], dict[str, int]]:
        """Return constants and attributes of a product with a matrix [K, N]."""
        inputs, outputs = matrix.shape
        sizes = {"K": inputs, "N": outputs, "accuracy_level": _ACCURACY}
        return self._of(matrix, bits), sizes | {"bits": bits, "block_size": _BLOCK}

    def table(self, table: np.ndarray) -> tuple[list[np.ndarray], dict[str, int]]:
        """Return constants and attributes of a lookup in a table [rows, width]."""
        integers, scales = self._of(table.T, 8)
        axes = {"gather_axis": 0, "quantize_axis": 1}
        return [integers.reshape(table.shape), scales], axes | {"bits": 8, "block_size": _BLOCK}

    def _of(self, matrix: np.ndarray, bits: int) -> list[np.ndarray]:
        matrix = np.ascontiguousarray(matrix)
        key = hashlib.sha256(matrix.view(np.uint8).data).digest(), bits
        if key not in self._known:
            # With 4 bits, a range that need not be symmetric makes the error smaller.
            nearest = quantiser(bits, symmetric=bits == 8)
            # The quantiser has no bfloat16.
            own = matrix if matrix.dtype in (np.float32, np.float16) else matrix.astype(np.float32)
            integers, scales, zeros = nearest.qbits_block_quant(own)
            parts = [integers, scales.astype(matrix.dtype)]
            self._known[key] = parts if nearest.config.is_symmetric else [*parts, zeros]
        return self._known[key]


def quantiser(bits: int, symmetric: bool) -> Any:
    """Return ONNX Runtime's quantiser to the nearest integer, for blocks of a matrix [K, N].

    Args:
        bits: Of an integer, 4 or 8.
        symmetric: Whether zero is the level in the middle.

    Returns:
        The `DefaultWeightOnlyQuantizer`.
    """
    # Its module sets up the root logger, unless that has a handler.
    silent = logging.NullHandler()
    logging.root.addHandler(silent)
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    finally:
        logging.root.removeHandler(silent)
    config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, bits=bits, is_symmetric=symmetric)
    return DefaultWeightOnlyQuantizer(config)


# *** replacing ***


def _replace(
    node: onnx_ir.Node, kind: str, quantised: tuple[list[np.ndarray], dict[str, int]]
) -> None:
    """Put an operator on integers in the place of one whose activations it takes."""
    from onnx_ir import convenience, tape

    constants, attributes = quantised
    place = 1 if kind == "MatMulNBits" else 0
    weight: Any = node.inputs[place]
    graph: Any = node.graph
    values: list[onnx_ir.Value | None] = [
        _initialiser(graph, f"{weight.name}_{attributes['bits']}_{part}", array)
        for part, array in zip(("integers", "scales", "zeros"), constants, strict=False)
    ]
    # Rows are taken by ids, which come after the table itself.
    values.insert(0 if place else 1, node.inputs[1 - place])
    made = tape.Tape()
    result = made.op(kind, values, attributes=attributes, domain="com.microsoft")
    if len(node.inputs) == 3:
        # Case: a bias. Not every device takes it as an input of the product.
        result = made.op("Add", [result, node.inputs[2]])
    convenience.replace_nodes_and_values(graph, node, [node], made.nodes, node.outputs, [result])


def _initialiser(graph: onnx_ir.Graph, name: str, array: np.ndarray) -> onnx_ir.Value:
    """Return a constant of a graph, which is made if it is not there."""
    import onnx_ir

    if name in graph.initializers:
        return graph.initializers[name]
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape))
    value.dtype = tensor.dtype
    graph.register_initializer(value)
    return value


def _drop_unused(graph: onnx_ir.Graph) -> None:
    """Drop the constants that nothing reads any more."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
