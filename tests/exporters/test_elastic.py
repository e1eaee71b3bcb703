"""Exports whose counts are inputs, against a reduced model with each count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import tiny
import torch
from closeness import assert_onnx_close

from deos_fx.exporters.elastic import take_counts
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.policy.counts import with_counts
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

# Merging with masses that bias attention, of each image alone and of all; positions that move.
POLICY = Policy(
    (
        Reduction("projector", 24, gain=1, mass_bias=0.5),
        Reduction("decoder.0", 9, position="grid"),
    )
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    model = tiny.shared_llava(2)
    folder = tmp_path_factory.mktemp("elastic")
    example = tiny.inputs(model, images=2)
    export_onnx(ReducedModel(model, POLICY), folder, example, elastic=True)
    return OnnxModel.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [(24, 9), (63, 40), (2, 1), (0.5, 0.125)])
def test_any_count_gives_the_logits_of_a_policy_with_it(
    exported: OnnxModel, keep: tuple[Any, ...]
) -> None:
    model = tiny.shared_llava(2)
    batch = tiny.inputs(model, 3, images=2, text=5, seed=1)
    expected = ReducedModel(model, with_counts(POLICY, keep))
    found = exported.keeping(*keep)
    # Rows are padded in front, and what is said of padding does not count.
    text = slice(-5, None)
    assert_onnx_close(found(**batch).logits[:, text], expected(**batch).logits[:, text])
    given = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(found.generate(**batch, **given), expected.generate(**batch, **given))


def test_counts_that_cannot_be_taken_are_refused() -> None:
    model = OnnxModel.__new__(OnnxModel)
    model._manifest = {"elastic": [64, 64], "model": {"decoder_layers": 2}}
    model._policy = POLICY
    for keep, reason in (
        ((24,), "give 2 counts, for projector, decoder.0"),
        ((64, 9), "projector keeps all of 64 tokens"),
        ((9, 9), "decoder.0 keeps all of 9 tokens"),
        ((9, 24), "projector leaves only 9"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.keeping(*keep)
    model._manifest["elastic"] = None
    with pytest.raises(ValueError, match="Export it with elastic=True"):
        model.keeping(24, 9)


def test_a_count_takes_the_place_of_a_tensor_that_is_as_long(tmp_path: Path) -> None:
    kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    given = [
        onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape([name]))
        for name in ("other", "keep_1", "keep_2")
    ]
    nodes = [onnx_ir.node("Shape", [value]) for value in given]
    for node in nodes:
        node.outputs[0].name = f"length_{node.inputs[0].name}"
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    outputs = [node.outputs[0] for node in nodes]
    graph = onnx_ir.Graph(given, outputs, nodes=nodes, opset_imports={"": 18}, name="graph")
    program = onnx_ir.Model(graph, ir_version=10)
    take_counts(program)
    onnx_ir.save(program, tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    values = {"other": torch.ones(3), "keep_1": torch.tensor([5]), "keep_2": torch.tensor([7])}
    found = session.run(None, {name: value.numpy() for name, value in values.items()})
    assert [length.tolist() for length in found] == [[3], [5], [7]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"selector": "strided"}, "the selector 'strided'"),
        ({"residual": True, "gain": 0.5}, "a residual token"),
        ({"keep": 1.0}, "keeps all of 64 tokens"),
    ],
)
def test_reductions_of_which_more_depends_on_the_count_are_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    policy = Policy((replace(Reduction("projector", 24), **change),))
    with pytest.raises(ValueError, match=reason):
        export_onnx(ReducedModel(tiny.shared_llava(2), policy), tmp_path / "x", elastic=True)
    with pytest.raises(ValueError, match="reduces nothing"):
        export_onnx(ReducedModel(tiny.shared_llava(2), Policy()), tmp_path / "x", elastic=True)
    assert not (tmp_path / "x").exists()
