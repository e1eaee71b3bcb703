"""Weights that sessions share: values that lie in the mapped file, whatever their type."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from deos_fx.exporters.manifest import write_weights
from deos_fx.exporters.shared import SharedWeights

SIZE = 1024
ARRAYS = {
    "float": np.arange(SIZE, dtype=np.float32),
    "half": np.arange(SIZE, dtype=np.float16),
    "bfloat": np.arange(SIZE).astype(onnx_ir.DataType.BFLOAT16.numpy()),
    "double": np.arange(SIZE, dtype=np.float64),
    "bytes": np.arange(SIZE).astype(np.uint8),
    "signed": -np.arange(SIZE).astype(np.int8),
    "flags": np.arange(SIZE) % 3 == 0,
    "int": np.arange(SIZE, dtype=np.int32),
    "matrix": np.arange(SIZE, dtype=np.int64).reshape(2, -1),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two graphs, of which the second has the constants in another order, by other names."""
    programs = {}
    for graph, mark in (("prefill", ""), ("decode", "_again")):
        names = list(ARRAYS)[:: -1 if mark else 1]
        values = [
            onnx_ir.Value(name=name + mark, const_value=onnx_ir.tensor(ARRAYS[name]))
            for name in names
        ]
        values.append(onnx_ir.Value(name="small", const_value=onnx_ir.tensor(np.ones(2))))
        for value in values:
            value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        made = onnx_ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21})
        programs[graph] = onnx_ir.Model(made, ir_version=10)
    write_weights(list(programs.values()), tmp_path)
    for name, program in programs.items():
        onnx_ir.save(program, tmp_path / f"{name}.onnx")
    return tmp_path


def test_values_are_those_of_the_file_and_the_same_for_all_graphs(folder: Path) -> None:
    shared, cpu = SharedWeights(folder), torch.device("cpu")
    prefill = shared.of(folder / "prefill.onnx", cpu)
    decode = shared.of(folder / "decode.onnx", cpu)
    # What is small is in the graph itself.
    assert set(prefill) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert decode[f"{name}_again"] is prefill[name]
        found = torch.from_dlpack(prefill[name])
        assert found.shape == array.shape
        assert np.array_equal(found.double().numpy(), array.astype(np.float64))
    places = [value.data_ptr() for value in prefill.values()]
    # One mapping, in which each constant starts at a page.
    assert len({place % 4096 for place in places}) == 1
    pages = [-(-array.nbytes // 4096) for array in ARRAYS.values()]
    assert max(places) - min(places) == 4096 * sum(pages[:-1])


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_on_cuda_each_weight_is_copied_once(
    folder: Path, device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what is asked of ONNX Runtime."""
    made = []

    def reserve(*given: Any) -> SimpleNamespace:
        value = SimpleNamespace(given=given)
        value.update_inplace = lambda array: setattr(value, "array", array)
        made.append(value)
        return value

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", reserve)
    shared = SharedWeights(folder)
    found = [shared.of(folder / f"{x}.onnx", torch.device(device)) for x in ("prefill", "decode")]
    assert len(made) == len(ARRAYS)
    for name, array in ARRAYS.items():
        value = found[0][name]
        assert found[1][f"{name}_again"] is value
        kind = onnx_ir.tensor(array).dtype
        assert value.given == (array.shape, kind, "cuda", index)
        assert value.array.tobytes() == array.tobytes()
