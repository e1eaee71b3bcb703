"""Graphs for one token, and constants that fusions have left out."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from deos_fx.exporters import fuse as fuse_module
from deos_fx.exporters.fuse import fuse, of_one_token

FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)


def dims(value: onnx_ir.Value) -> list[object]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def test_a_graph_of_one_token_has_its_length_everywhere() -> None:
    x = onnx_ir.Value(name="x", type=FLOAT, shape=onnx_ir.Shape(["batch", "new", 4]))
    without = onnx_ir.Value(name="without", type=FLOAT)
    shapes = [["new + past", "renew"], ["new", 1], [3, None], ["2*new", "past"]]
    nodes = [onnx_ir.node("Identity", [x]) for _ in shapes]
    for i, (node, shape) in enumerate(zip(nodes, shapes, strict=True)):
        node.outputs[0].name, node.outputs[0].type = f"y{i}", FLOAT
        node.outputs[0].shape = onnx_ir.Shape(shape)
    outputs = [node.outputs[0] for node in nodes]
    graph = onnx_ir.Graph([x, without], outputs, nodes=nodes, opset_imports={"": 18})
    single = of_one_token(onnx_ir.Model(graph, ir_version=10), "new").graph
    assert dims(single.inputs[0]) == ["batch", 1, 4]
    assert single.inputs[1].shape is None
    assert [dims(value) for value in single.outputs] == [
        ["1 + past", "renew"],
        [1, 1],
        [3, None],
        ["2*1", "past"],
    ]
    assert dims(x) == ["batch", "new", 4], "the graph for any number stays"


def test_constants_that_a_fusion_leaves_out_are_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fusion is a stand-in that replaces what an addition reads."""
    seen = []

    def constant() -> onnx_ir.Value:
        return onnx_ir.Value(name="one", const_value=onnx_ir.tensor(np.ones(3, np.float32)))

    def fusion(program: onnx_ir.Model, device: str) -> None:
        seen.append(device)
        for node in program.graph:
            node.replace_input_with(1, constant())

    monkeypatch.setattr("transformers.exporters.onnxruntime_fusions.fuse_for_onnxruntime", fusion)
    programs = {}
    for name in ("prefill", "decode"):
        x = onnx_ir.Value(name="x", type=FLOAT, shape=onnx_ir.Shape([3]))
        # Of three inputs, one is left out.
        nodes = [onnx_ir.node("Any", [x, x, None]) for _ in range(2)]
        outputs = [node.outputs[0] for node in nodes]
        graph = onnx_ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 18})
        programs[name] = onnx_ir.Model(graph, ir_version=10)
    fuse(programs, "cpu")
    # Attention over a prompt is fused as for CUDA, whatever the device.
    assert seen == ["cuda", "cpu"]
    for program in programs.values():
        (known,) = program.graph.initializers.values()
        assert all(node.inputs[1] is known and node.inputs[0].name == "x" for node in program.graph)
    assert fuse_module.DEVICES == ("cpu", "cuda")
