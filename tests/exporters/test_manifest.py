"""The files of an export: what a manifest has to say, and weights that are written once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from deos_fx.contents import RECORD
from deos_fx.exporters.manifest import (
    FORMAT,
    VERSION,
    WEIGHTS,
    read_manifest,
    write_weights,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: .*export the model again"),
        ("[]", "is damaged: it is no object"),
        ("{}", 'does not say "deos_fx": "onnx"'),
        (json.dumps({"deos_fx": FORMAT, "version": VERSION + 1}), f"reads version {VERSION}"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder that deos_fx.export_onnx wrote"):
        read_manifest(tmp_path)
    manifest = {"deos_fx": FORMAT, "version": VERSION, "graphs": {}}
    (tmp_path / RECORD).write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="cannot be checked for damage"):
        assert read_manifest(tmp_path) == manifest


def program(**weights: np.ndarray) -> onnx_ir.Model:
    values = [
        onnx_ir.Value(name=name, const_value=onnx_ir.tensor(w)) for name, w in weights.items()
    ]
    graph = onnx_ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18})
    return onnx_ir.Model(graph, ir_version=10)


def test_equal_weights_of_several_graphs_are_written_once(tmp_path: Path) -> None:
    large, other = np.arange(1000.0), np.ones(1000)
    programs = [program(a=large, small=np.ones(2)), program(b=large.copy(), c=other)]
    write_weights(programs, tmp_path)
    a, small = (programs[0].graph.initializers[name].const_value for name in ("a", "small"))
    b, c = (programs[1].graph.initializers[name].const_value for name in ("b", "c"))
    assert (a.offset, b.offset) == (0, 0)
    assert c.offset == 8192, "the next page"
    assert not isinstance(small, onnx_ir.ExternalTensor)
    assert (tmp_path / WEIGHTS).stat().st_size == 8192 + other.nbytes
    assert np.array_equal(b.numpy(), large) and np.array_equal(c.numpy(), other)
