"""The files of an export: what a manifest has to say, and weights that are written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from attempts import SPACE, WHOLE

from deos_fx.contents import RECORD
from deos_fx.exporters import session
from deos_fx.exporters.manifest import (
    VERSION,
    WEIGHTS,
    check_spaces,
    dropped_tokens,
    read_manifest,
    write_weights,
)
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


def test_a_whole_manifest_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder that deos_fx.export_onnx wrote"):
        read_manifest(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(WHOLE))
    with pytest.warns(UserWarning, match="cannot be checked for damage"):
        found = read_manifest(tmp_path)
    absent = dict.fromkeys(["elastic", "files", "sha256", "weights"])
    assert found == WHOLE | absent | {"guards": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": float(VERSION)}, "version 4.0"),
        ({"pixels": [1, 3, 32, 10**40]}, r"pixels\[3\] is 1000"),
        ({"pixels": [1, 3, 0, 32]}, r"pixels\[2\] is 0; it should be greater than or equal to 1"),
        ({"inputs": ["pixel_values"]}, "should name each once, and input_ids"),
        ({"inputs": ["input_ids", "input_ids"]}, "should name each once, and input_ids"),
        ({"graphs": ["prefill", "decode", "image_encoder"]}, "should name each of .* once"),
        ({"graphs": ["prefill", "decode", "extend", "extend"]}, "should name each of .* once"),
        ({"graphs": ["prefill", "decode", "extend", "vision"]}, r"graphs\[3\] is 'vision'"),
        ({"device": "cpu\n"}, "device is"),
        ({"packages": {"torch": "\x1b[2J"}}, "packages.torch is .* should match pattern"),
        ({"model": {"model_type": "a"}}, "model lacks the field 'vision_layers'"),
        ({"spaces": [SPACE | {"position": "last"}]}, "position is 'last'"),
        ({"spaces": [SPACE | {"dropped": 64}]}, "of layers there are 4, and of image tokens 64"),
        ({"spaces": [SPACE, SPACE | {"dropped": 3}]}, "with ever fewer tokens"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / RECORD).write_text(json.dumps(WHOLE | changes))
    with pytest.raises(ValueError, match=f"{RECORD} is not the manifest of an export: .*{message}"):
        read_manifest(tmp_path)


def test_the_message_of_a_manifest_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(WHOLE | {"version": 99}))
    with pytest.raises(ValueError, match=r"or use the release that wrote it\.$"):
        read_manifest(tmp_path)


# *** token spaces ***

SPACES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "keep": ({}, set(), set()),
    "biased": ({"biased": True}, {"key_bias_2"}, set()),
    "compact": ({"position": "compact"}, set(), {"position_ids_2"}),
    "grid": ({"position": "grid", "biased": True}, {"key_bias_2", "shift_2"}, {"position_ids_2"}),
}


@pytest.mark.parametrize("name", SPACES)
def test_spaces_are_those_of_the_graphs(tmp_path: Path, name: str) -> None:
    changes, gives, takes = SPACES[name]
    manifest = {"spaces": [SPACE, SPACE | {"dropped": 50} | changes]}
    outputs, inputs = {"logits", "origin_1", "origin_2", *gives}, {"input_ids", *takes}
    check_spaces(tmp_path, manifest, outputs, inputs)
    # A graph need not read positions that it is given.
    check_spaces(tmp_path, manifest, outputs, {"input_ids"})
    wrong = [(outputs - {x}, inputs) for x in outputs - {"logits"}]
    wrong += [(outputs | {x}, inputs) for x in ("origin_3", "key_bias_1", "shift_1")]
    wrong += [(outputs, inputs | {x}) for x in ("position_ids_1", "position_ids_3")]
    for given in wrong:
        with pytest.raises(ValueError, match=f"{RECORD} names spaces with .* from two exports"):
            check_spaces(tmp_path, manifest, *given)


def test_every_space_may_move(tmp_path: Path) -> None:
    spaces = [SPACE | {"position": "compact"}, SPACE | {"dropped": 50, "position": "compact"}]
    inputs = {"input_ids", "position_ids_1", "position_ids_2"}
    check_spaces(tmp_path, {"spaces": spaces}, {"origin_1", "origin_2"}, inputs)


def test_spaces_of_two_exports_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        check_spaces(tmp_path, {"spaces": []}, {"shift_1", "origin_1"}, {"position_ids_1"})
    has = "with none, but the graphs have origin_1, position_ids_1, shift_1:"
    assert has in str(caught.value)


def test_dropped_tokens_are_counted_image_by_image() -> None:
    policy = Policy((Reduction("projector", 0.25), Reduction("decoder.1", 0.125)))
    # A quarter of each image, then an eighth of it; of 4 layers, or of 2.
    assert dropped_tokens(policy, [64, 32], 4) == [96 - 24, 96 - 12]
    assert dropped_tokens(policy, [64, 32], 2) == [96 - 24, 96 - 12]


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


def test_graphs_that_no_export_has(tmp_path: Path) -> None:
    value = onnx_ir.val("x", onnx_ir.DataType.UINT8, [1])
    graph = onnx_ir.Graph([value], [value], nodes=[], opset_imports={"": 18}, name="g")
    path = tmp_path / "prefill.onnx"
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), path)
    with pytest.raises(ValueError, match=r"prefill.onnx takes tensor\(uint8\), as no export does"):
        session.open(path, "cpu")
    path.write_bytes(b"no graph")
    with pytest.raises(ValueError, match="prefill.onnx cannot be run here"):
        session.open(path, "cpu")
