"""Weights of 8 and 4 bits: against their definition in numpy, and an export that has them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import tiny
import torch
from onnx_ir import tape

from deos_fx.exporters.check import check_export
from deos_fx.exporters.graphs.example import example_of
from deos_fx.exporters.manifest import write_weights
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.exporters.quantise import WEIGHTS, quantise
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

ROWS, WIDTH, INNER, BLOCK = 100, 64, 80, 32
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((ROWS, WIDTH)).astype(np.float32)
UP = RANDOM.standard_normal((WIDTH, INNER)).astype(np.float32)
DOWN = RANDOM.standard_normal((INNER, WIDTH)).astype(np.float32)
BIAS = RANDOM.standard_normal(WIDTH).astype(np.float32)
# A learned score: too narrow to gain anything.
SCORE = RANDOM.standard_normal((WIDTH, 4)).astype(np.float32)


def program() -> onnx_ir.Model:
    """A lookup of ids, two layers, a score, and logits by the table itself."""
    ids = onnx_ir.Value(
        name="ids", type=onnx_ir.TensorType(onnx_ir.DataType.INT64), shape=onnx_ir.Shape(["batch"])
    )
    made = tape.Tape()
    constants = {
        "table": TABLE,
        "up": UP,
        "down": DOWN.T.copy(),
        "bias": BIAS,
        "score": SCORE,
        "head": TABLE.T.copy(),
    }
    c = {name: made.initializer(onnx_ir.tensor(array), name) for name, array in constants.items()}
    rows = made.op("Gather", [c["table"], ids])
    hidden = made.op("MatMul", [rows, c["up"]])
    # As a linear layer is written for tokens without an axis of batches: [N, K] and a bias.
    hidden = made.op("Gemm", [hidden, c["down"], c["bias"]], {"transB": 1})
    outputs = [
        made.op("MatMul", [hidden, c["head"]]),
        made.op("MatMul", [hidden, c["score"]]),
    ]
    for name, value in zip(("logits", "scores"), outputs, strict=True):
        value.name, value.dtype = name, onnx_ir.DataType.FLOAT
    graph = onnx_ir.Graph(
        [ids],
        outputs,
        nodes=made.nodes,
        initializers=tuple(c.values()),
        opset_imports={"": 21},
    )
    return onnx_ir.Model(graph, ir_version=10)


def rounded(matrix: np.ndarray, bits: int) -> np.ndarray:
    """A matrix [K, N] of which every 32 weights of a column are the nearest of 2^bits levels."""
    inputs, outputs = matrix.shape
    padded = np.pad(matrix, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, BLOCK, outputs)
    if bits == 8:
        # Symmetric: the largest value, whatever its sign, is level -128.
        largest = np.take_along_axis(padded, np.abs(padded).argmax(1, keepdims=True), 1)
        scale, zero = largest / -128, 0
        low, high = -128, 127
    else:
        least, most = padded.min(1, keepdims=True), padded.max(1, keepdims=True)
        scale = (np.maximum(most, 0) - np.minimum(least, 0)) / 15
        zero = np.round(-np.minimum(least, 0) / scale)
        low, high = 0, 15
    levels = np.clip(np.round(padded / scale) + zero, low, high)
    return ((levels - zero) * scale).reshape(-1, outputs)[:inputs].astype(np.float32)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_graphs_compute_with_the_nearest_levels(weights: str) -> None:
    bits, model, handlers = WEIGHTS[weights], program(), list(logging.root.handlers)
    quantise({"prefill": model}, weights)
    assert logging.root.handlers == handlers
    kinds = [node.op_type for node in model.graph]
    product = "MatMulNBits"
    assert kinds == ["GatherBlockQuantized", product, product, "Add", product, "MatMul"]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    ids = np.arange(0, ROWS, 7)
    logits, scores = session.run(None, {"ids": ids})
    # Embeddings and logits have 8 bits in either case.
    rows = rounded(TABLE.T, 8).T[ids]
    hidden = rows @ rounded(UP, bits) @ rounded(DOWN, bits) + BIAS
    # Products round activations to 8 bits, which is why the tolerance is not that of float32.
    for found, right in ((logits, hidden @ rounded(TABLE.T, 8)), (scores, hidden @ SCORE)):
        assert np.abs(found - right).max() < 2e-2 * np.abs(right).max()
    # The levels of the integers matter by more than that.
    exact = (TABLE[ids] @ UP @ DOWN + BIAS) @ SCORE
    if bits == 4:
        assert np.abs(scores - exact).max() > 4e-2 * np.abs(exact).max()


def test_graphs_share_integers_and_so_do_tied_weights(tmp_path: Path) -> None:
    programs = {"prefill": program(), "decode": program()}
    quantise(programs, "int4")
    write_weights(list(programs.values()), tmp_path)
    places = [
        {
            name: value.const_value.offset
            for name, value in made.graph.initializers.items()
            if isinstance(value.const_value, onnx_ir.ExternalTensor)
        }
        for made in programs.values()
    ]
    assert places[0] == places[1]
    assert places[0]["table_8_integers"] == places[0]["head_8_integers"]
    assert "up" not in places[0] and "score" in places[0]


def test_bfloat16_has_scales_of_its_own() -> None:
    model = program()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value.numpy().astype(onnx_ir.DataType.BFLOAT16.numpy())
        value.const_value = onnx_ir.tensor(tensor, name=name)
    quantise({"prefill": model}, "int8")
    scales = model.graph.initializers["up_8_scales"].const_value
    assert scales.dtype == onnx_ir.DataType.BFLOAT16


# *** an export ***


@pytest.fixture(scope="module")
def reduced() -> ReducedModel:
    return ReducedModel(tiny.tiny_llava(1), Policy((Reduction("projector", 16),)))


@pytest.fixture(scope="module")
def folder(reduced: ReducedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stages: list[str] = []
    target = export_onnx(
        reduced,
        tmp_path_factory.mktemp("int8") / "model",
        weights="int8",
        progress=lambda stage, done, total: stages.append(stage) if done == total else None,
    )
    # The graphs are compared before their weights are rounded, and after.
    assert stages == ["trace", "fuse", "write", "check", "quantise", "write", "check"]
    assert not any(path.is_dir() for path in target.iterdir())
    return target


def test_an_export_of_8_bits_answers_nearly_like_the_model(
    reduced: ReducedModel, folder: Path
) -> None:
    assert json.loads((folder / "deos_fx.json").read_text())["weights"] == "int8"
    runtime, inputs = OnnxModel.from_pretrained(folder, "cpu"), tiny.inputs(reduced.model, 2)
    found, right = (model(**inputs).logits[:, -5:] for model in (runtime, reduced))
    assert 0 < (found - right).abs().max() < 5e-2 * right.abs().max()
    assert runtime.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_graphs_of_rounded_weights_have_to_agree(
    reduced: ReducedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a single token is decoded otherwise, but near enough to the model."""
    run = OnnxModel._run_decode

    def otherwise(self: Any, inputs: dict[str, Any], cache: Any) -> torch.Tensor:
        logits = run(self, inputs, cache)
        return logits * 1.2 if logits.shape[1] == 1 else logits

    monkeypatch.setattr(OnnxModel, "_run_decode", otherwise)
    with pytest.raises(ValueError, match="not the same in ONNX Runtime"):
        check_export(
            reduced,
            example_of(reduced.model, None, 10),
            "ONNX Runtime",
            torch.device("cpu"),
            lambda: OnnxModel.from_pretrained(folder, "cpu"),
            "int8",
        )


def test_rounded_weights_cannot_be_shared_on_the_cpu(folder: Path) -> None:
    with pytest.raises(ValueError, match="low_memory=True, but .* has int8 weights"):
        OnnxModel.from_pretrained(folder, "cpu", low_memory=True)


def test_other_types_of_weights_are_refused(reduced: ReducedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights is 'int2'; give 'int8' or 'int4' or None"):
        export_onnx(reduced, tmp_path / "out", weights="int2")
