"""Folders of exports: whole at every instant, and refused when they are damaged.

What is written are graphs of one addition: the files count here, not what is in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from kills import contents, damaged, kills
from learned import learned_at
from tiny import shared_llava, tiny_llava

from deos_fx.contents import RECORD, record_of, write_record
from deos_fx.exporters import onnx as onnx_module
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.exporters.session import open
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.version import __version__

POLICIES = {
    "old": Policy((learned_at("projector", 20),)),
    "new": Policy((Reduction("projector", 8),)),
}


def program(value: float, *spaces: str) -> onnx_ir.Model:
    """A graph that adds weights, which are large enough for a file of their own.

    Args:
        value: The weights.
        *spaces: Names of further outputs.
    """
    weights = onnx_ir.Value(
        name="weights", const_value=onnx_ir.tensor(np.full(300, value, np.float32))
    )
    x = onnx_ir.Value(
        name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape([300])
    )
    add = onnx_ir.node("Add", [x, weights])
    nodes = [add, *(onnx_ir.node("Identity", [x]) for _ in spaces)]
    outputs = [node.outputs[0] for node in nodes]
    for name, output in zip(("y", *spaces), outputs, strict=True):
        output.name, output.type, output.shape = name, x.type, x.shape
    graph = onnx_ir.Graph([x], outputs, nodes=nodes, initializers=[weights], opset_imports={"": 18})
    return onnx_ir.Model(graph, ir_version=10)


def write(target: Path, name: str) -> None:
    """Export a model, with stand-ins for its graphs."""
    value = {"old": 1.0, "new": 2.0}[name]

    def of(reduced: Any, example: Any, least: int, *rest: Any) -> Any:
        programs = {graph: program(value) for graph in ("extend", "decode")}
        # What tells the token spaces of the policies.
        spaces = {"old": ("origin_1", "key_bias_1"), "new": ("origin_1",)}[name]
        programs = {"prefill": program(value, *spaces), **programs}
        constants: Mapping[str, Any] = {}
        if name == "old":
            programs["image_encoder"] = program(value)
            constants = {"image_sizes": torch.ones(1, 2, dtype=torch.int64)}
        return onnx_module._Export(
            reduced, example, rest[0], programs, dict(constants), (), *rest[1:]
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_module._Export, "of", of)
        patch.setattr(onnx_module, "fuse", lambda programs, device: None)
        reduced = ReducedModel(shared_llava(2), POLICIES[name])
        export_onnx(reduced, target, device="cpu", verify=False)


FUSED, PLAIN = ["fuse", "write", "check"], ["write aside", "check aside"]


@pytest.mark.parametrize(
    ("device", "gpus", "weights", "steps"),
    [
        ("cpu", 0, None, FUSED),
        # Before they are fused, the graphs for a GPU run without one.
        ("cuda", 0, None, [*PLAIN, "fuse", "write"]),
        ("cuda", 1, None, FUSED),
        # Rounding would hide what is wrong with the graphs.
        ("cpu", 0, "int4", ["fuse", *PLAIN, "int4", "write", "check"]),
        ("cuda", 0, "int8", [*PLAIN, "fuse", "int8", "write"]),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_graphs_are_compared_where_they_can_be(
    device: str,
    gpus: int,
    weights: str | None,
    steps: list[str],
    verify: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    of: Any = onnx_module._Export

    def note(step: str) -> Any:
        def noted(self: Any, folder: Path, where: str) -> None:
            aside = " aside" if folder.name != "new" else ""
            # Plain graphs are those of the CPU.
            assert where == ("cpu" if aside and not gpus else device)
            seen.append(step + aside)

        return noted

    monkeypatch.setattr(onnx_module, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(of, "write", note("write"))
    monkeypatch.setattr(of, "check", note("check"))
    monkeypatch.setattr(onnx_module, "fuse", lambda programs, device: seen.append("fuse"))
    monkeypatch.setattr(onnx_module, "quantise", lambda programs, kind: seen.append(kind))
    monkeypatch.setattr(of, "of", lambda *given: of(*given[:2], given[3], {}, {}, (), *given[4:]))
    reduced = ReducedModel(shared_llava(2), POLICIES["new"])
    told: list[tuple[str, int, int]] = []
    export_onnx(
        reduced,
        tmp_path / "x",
        device=device,
        weights=weights,
        verify=verify,
        progress=lambda *stage: told.append(stage),
    )
    of_weights = [("quantise", 0, 1), ("quantise", 1, 1)]
    assert [one for one in told if one[0] == "quantise"] == (of_weights if weights else [])
    compared = [step for step in steps if verify or step not in (*PLAIN, "check")]
    assert seen == compared


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for name in POLICIES:
        write(folder / name, name)
    return {name: folder / name for name in POLICIES}


@pytest.fixture
def target(exports: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exports["old"], tmp_path / "target")


def test_the_stand_in_is_loaded_with_its_weights(exports: dict[str, Path]) -> None:
    for name, value in (("old", 1.0), ("new", 2.0)):
        assert OnnxModel.from_pretrained(exports[name], "cpu").config.model_type == "llava"
        session = open(exports[name] / "decode.onnx", "cpu")
        assert session({"x": torch.zeros(300)})["y"].numpy().tolist() == [value] * 300


def test_a_manifest_says_what_made_the_graphs(exports: dict[str, Path]) -> None:
    record = record_of(exports["old"])
    expected = {"deos_fx": __version__}
    expected |= {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
    assert record["packages"] == expected
    assert (record["opset"], record["device"], record["dtype"]) == (18, "cpu", "float32")
    assert (record["pixels"], record["image_tokens"]) == ([1, 3, 64, 64], 64)


def test_a_kill_never_leaves_a_mixture(exports: dict[str, Path], target: Path) -> None:
    states = {name: contents(folder) for name, folder in exports.items()}
    seen = set()
    for _ in kills(lambda: write(target, "new")):
        try:
            OnnxModel.from_pretrained(target, "cpu")
            found = contents(target)
            seen |= {name for name, state in states.items() if found == state} or {"a mixture"}
        except ValueError as error:
            assert "is incomplete" in str(error) and "export the model again" in str(error)
            seen.add("incomplete")
        # As before, with what the kill has left.
        shutil.rmtree(target)
        shutil.copytree(exports["old"], target)
    assert seen == {"old", "incomplete", "new"}
    (target / "mine.onnx").write_text("mine")
    write(target, "new")
    assert contents(target) == states["new"] | {"mine.onnx": b"mine"}
    assert not list(target.parent.rglob(".*"))


def test_every_damage_is_noticed(target: Path) -> None:
    count = 0
    for case in damaged(target):
        with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|has no deos_fx\.json"):
            OnnxModel.from_pretrained(target, "cpu")
            pytest.fail(case)
        count += 1
    assert count == 13 * len(contents(target)) == 13 * 11
    OnnxModel.from_pretrained(target, "cpu")


def test_what_would_be_read_besides_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports["new"], tmp_path / "new"))
    shutil.copy(exports["old"] / "policy.safetensors", folder)
    with pytest.raises(ValueError, match="policy.safetensors that was not written with the others"):
        OnnxModel.from_pretrained(folder, "cpu")


def recorded_anew(folder: Path) -> None:
    """Let the manifest say that the files are right as they are."""
    record = record_of(folder)
    write_record(folder, {name: record[name] for name in record.keys() - {"files", "sha256"}})


def test_the_policy_is_that_of_the_graphs(target: Path) -> None:
    Policy((Reduction("decoder.0", 20),)).save(target / "policy.json")
    recorded_anew(target)
    with pytest.raises(ValueError, match=r"policy\.json is not the policy of these graphs"):
        OnnxModel.from_pretrained(target, "cpu")
    (target / "policy.json").unlink()
    recorded_anew(target)
    with pytest.raises(ValueError, match=r"has no policy\.json; export the model again"):
        OnnxModel.from_pretrained(target, "cpu")


@pytest.mark.parametrize("content", ["1", '""', '{"pad_token_id": "x"}'])
def test_how_it_generates_is_told_if_it_makes_no_sense(target: Path, content: str) -> None:
    (target / "generation_config.json").write_text(content)
    recorded_anew(target)
    with pytest.raises(ValueError, match=f"^{target} cannot be loaded .TypeError: "):
        OnnxModel.from_pretrained(target, "cpu")


def test_folders_of_earlier_versions_are_loaded_with_a_warning(target: Path) -> None:
    record = json.loads((target / RECORD).read_text())
    del record["files"], record["sha256"]
    (target / RECORD).write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="cannot be checked for damage") as caught:
        OnnxModel.from_pretrained(target, "cpu")
    assert len(caught) == 1


def test_a_graph_that_is_opened_late_is_that_of_the_others(target: Path) -> None:
    model = OnnxModel.from_pretrained(target, "cpu")
    write(target, "new")
    with pytest.raises(ValueError, match="written anew after its loading began"):
        model._extend()


def test_folders_in_the_place_of_files_are_refused_before_the_work(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target / "policy.json").unlink()
    (target / "policy.json").mkdir()
    monkeypatch.setattr(onnx_module, "decode_graph", None)
    with pytest.raises(IsADirectoryError, match=r"policy\.json: it is a folder. Move it away"):
        export_onnx(ReducedModel(tiny_llava(1), Policy()), target, device="cpu")
