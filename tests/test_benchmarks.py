"""The benchmark commands run and write what they promise; how fast anything is, is not tested."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from benchmarks import (
    caches,
    calls,
    capture,
    elastic,
    export,
    gpu,
    latency,
    memory,
    onnx_kernels,
    operators,
    quantised,
    reductions,
    speed,
)
from benchmarks.common import build_inputs, build_model
from deos_fx.exporters.session import as_tensor
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce
from deos_fx.policy.policy import Policy

QUICK = {"shape": "llava-tiny", "text": 4, "new_tokens": 2, "repeats": 2}
TINY = {"shape": "llava-tiny", "text": 4, "keep": 8, "rounds": 1, "calls": 1, "scenes": 4}
VARIANTS = ("original", "empty", "reduced")


def measured(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[dict, list[dict]]:
    """Results, and what was saved on the way. Exporting takes long and has tests of its own."""
    monkeypatch.setattr(speed, "_export", lambda reduced, folder, advance: None)
    monkeypatch.setattr(speed, "_sessions", lambda folder, reduced, device: dict(reduced))
    saved: list[dict] = []
    quiet = Console(quiet=True)
    found = speed.measure(
        speed.Settings(**QUICK | settings),
        quiet,
        lambda results: saved.append(json.loads(json.dumps(results))),
    )
    speed._print(found, quiet)
    return found, saved


def test_speed_measures_all_variants_alike(monkeypatch):
    found, saved = measured(monkeypatch, batch=2)
    assert list(found["pytorch"]) == list(VARIANTS)
    assert list(found["onnxruntime"]) == ["empty", "reduced"]
    for figure in (*found["pytorch"].values(), *found["onnxruntime"].values()):
        for part in ("prefill", "decode"):
            assert len(figure[f"{part}_samples_ms"]) == QUICK["repeats"]
            assert figure[f"{part}_ms"] > 0 and figure[f"{part}_ratio"] > 0
    # The stand-ins for ONNX Runtime are the very same models.
    assert [figure["equal_tokens"] for figure in found["onnxruntime"].values()] == [4, 4]
    for runtime in ("pytorch", "onnxruntime"):
        first = next(iter(found[runtime].values()))
        assert first["prefill_ratio"] == first["decode_ratio"] == 1
    assert {"command", "date", "hardware", "versions", "settings", "policy"} <= set(found)
    # The results of PyTorch are safe before the export starts.
    assert ["onnxruntime" in results for results in saved] == [False, True]


def test_predicted_kv_cache_is_the_measured_one(monkeypatch):
    found, _ = measured(monkeypatch, onnx=False, preset="fastv", budget=0.5)
    for name in ("original", "reduced"):
        assert found["pytorch"][name]["kv_bytes"] == found["predicted"][name]["kv_bytes"]
    assert found["predicted"]["flops_ratio"] < 1
    assert "onnxruntime" not in found


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shape": "llava-2"}, "llava-1.5-7b"),
        ({"preset": "fast"}, "choose from fastv"),
        ({"budget": 1.5}, "visual_tokens"),
    ],
)
def test_bad_settings(monkeypatch, settings, message):
    with pytest.raises(ValueError, match=message):
        measured(monkeypatch, **settings)


def test_operators_measures_all_parts():
    saved: list[dict] = []
    quiet = Console(quiet=True)
    found = operators.measure(
        operators.Settings(**TINY, batch=2),
        quiet,
        lambda results: saved.append(json.loads(json.dumps(results))),
    )
    operators._print(found, quiet)
    reductions = dict(found["reductions"])
    assert reductions.pop("layer")["ratio"] == 1
    targets = {name: figure["target"] for name, figure in reductions.items() if figure["target"]}
    assert targets == {"prune (fastv)": 0.02, "merge": 0.04}
    for name, figure in reductions.items():
        assert figure["ms"] > 0 and len(figure["samples_ms"]) == 1
        # What neither looks at attention nor compares keys has nothing to observe.
        blind = name.startswith(("pool", "max_min", "determinantal"))
        assert (figure["observed"] is None) == blind
    # Both ways to write ToMe are one method: about 24 roundings of its standard normal tokens.
    assert found["tome"]["difference"] < 1e-5 and found["tome"]["direct"]["ratio"] == 1
    alone = [figure for name, figure in found["at_once"].items() if name.endswith(", 1")]
    assert [figure["disagreement"] for figure in alone] == [0, 0]
    assert all(0 <= figure["disagreement"] <= 1 for figure in found["at_once"].values())
    assert [set(results) - set(saved[0]) for results in saved] == [
        set(),
        {"tome"},
        {"tome", "at_once"},
    ]


@pytest.mark.parametrize("settings", [{"shape": "llava-2"}, {"keep": 64}, {"only": "time"}])
def test_bad_operator_settings(settings):
    with pytest.raises(ValueError, match="llava-1.5-7b|64 tokens|at_once"):
        operators.measure(
            operators.Settings(**TINY | settings), Console(quiet=True), lambda found: None
        )


def test_capture_measures_every_stage_without_a_value():
    found = capture.measure("llava-tiny")
    stages = {"inputs", "layout", "capture and analyse", "insert", "lower"}
    assert set(found["seconds"]) == stages and min(found["seconds"].values()) >= 0
    assert found["no_weight_has_values"] and found["nodes"] < found["nodes_lowered"] < 200
    assert found["imports_megabytes"] <= found["peak_megabytes"]


def test_calls_counts_what_is_captured_and_lowered():
    found = calls.measure(20, 4, 3)
    assert [step["calls"] for step in found["steps"]] == list(range(2, 21, 2))
    last = found["steps"][-1]
    # Of seven options, two are numbers of one input and two of another.
    assert last["captured"] == 5 and 5 <= last["lowered"] <= 20
    assert all(step["megabytes"] > 0 and step["objects"] > 0 for step in found["steps"])


def test_onnx_kernels_measures_every_form():
    found = onnx_kernels.products(64, 32, 1)
    assert len(found) == 8 and all(min(times.values()) > 0 for times in found.values())
    assert len(onnx_kernels.masks(64, 2, 16, 1)) == 2


class _Exports:
    """Stands in for ONNX Runtime, whose exports take long and have tests of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.made: dict[Any, Any] = {}
        monkeypatch.setattr(module, "export_onnx", self.export)
        monkeypatch.setattr(module.OnnxModel, "from_pretrained", self.load)

    def export(self, reduced: Any, folder: Any, *, weights: str | None, verify: bool) -> None:
        folder.mkdir()
        (folder / quantised.FILE).write_bytes(bytes(10))
        self.made[folder] = reduced

    def load(self, folder: Any, device: str, *, low_memory: bool = False) -> Any:
        return self.made[folder]


def test_quantised_compares_all_types_of_weights(monkeypatch):
    _Exports(monkeypatch, quantised)
    saved: list[Any] = []
    found = quantised.measure(8, lambda results: saved.append(json.dumps(results)))
    assert list(found) == ["empty", "merge"] and len(saved) == 6
    for variants in found.values():
        assert list(variants) == ["float32", "int8", "int4"]
        # The stand-ins are the very same model.
        assert all(figure["agreement"] == 1 for figure in variants.values())
        assert variants["int4"]["weights_bytes"] == 10


def test_memory_measures_a_load(monkeypatch, tmp_path):
    model = build_model("llava-tiny", torch.device("cpu"), torch.float32)
    save_file(build_inputs(model, 1, 4), tmp_path / memory.INPUTS)
    monkeypatch.setattr(memory.OnnxModel, "from_pretrained", lambda *_, **__: model)
    found = memory.load(tmp_path / "export", low_memory=True)
    assert found["peak_bytes"] >= found["loaded_bytes"] >= 0
    assert {"decode_1_seconds", "decode_4_seconds", "prefill_1_seconds"} <= set(found)
    medians = memory._medians([found, found], 100)
    assert medians["peak_of_weights"] == found["peak_bytes"] / 100


def test_shapes_are_those_of_the_published_models():
    sizes = {"llava-1.5-7b": 7.06, "qwen2.5-vl-7b": 8.29, "gemma3-4b": 4.3}
    for name, billions in sizes.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(capture.MODELS[name]())
        found = sum(weight.numel() for weight in model.parameters())
        assert found / 1e9 == pytest.approx(billions, rel=0.01)


SMALL = gpu.Settings(
    shape="llava-tiny",
    device="cpu",
    dtype="fp32",
    images=(1, 2),
    text=8,
    new_tokens=2,
    policies=1,
    repeats=1,
)


def test_gpu_measures_all_parts(monkeypatch):
    """Exporting takes long and has tests of its own."""
    monkeypatch.setattr(
        gpu, "export_onnx", lambda reduced, target, *_, **__: exported.append(reduced)
    )
    monkeypatch.setattr(gpu.OnnxModel, "from_pretrained", lambda *_: exported[-1])
    monkeypatch.setattr(
        gpu,
        "onnx_short_run",
        lambda model, lengths, *_: lambda inputs: gpu.short_run(model, lengths, **inputs),
    )
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    exported: list[Any] = []
    saved: list[int] = []
    found = gpu.measure(
        SMALL, Console(quiet=True), lambda results: saved.append(len(results["parts"]))
    )
    assert saved == list(range(1, 8)) and not found["left_out"]
    assert not any("fails" in part for part in found["parts"].values()), found["parts"]
    for images in ("1 image", "2 images"):
        variants = found["parts"][f"pytorch, {images}"]["variants"]
        for name in ("projector", "fastv"):
            figure = variants[name]
            assert figure["kv_bytes"] == figure["predicted_kv_bytes"]
            assert figure["promised_speed_up"] > 1 and figure["over_ideal"] > 0
        assert variants["original"]["speed_up"] == 1
        in_onnx = found["parts"][f"onnxruntime, {images}"]["variants"]
        assert set(in_onnx) == {"empty", "projector", "fastv"}
        assert in_onnx["empty"]["speed_up"] == 1 and in_onnx["fastv"]["over_ideal"] > 0
    assert found["parts"]["latency, 1 image"]["median_error"] >= 0
    # Fewer layers are exported.
    assert exported[0].model.config.get_text_config().num_hidden_layers == SMALL.onnx_layers
    assert gpu.table(found).row_count > 20


def test_a_gpu_without_time_says_what_it_left_out():
    found = gpu.measure(replace(SMALL, seconds=-1.0), Console(quiet=True), lambda results: None)
    assert not found["parts"] and len(found["left_out"]) == 7


def test_runs_to_compare_with_compute_what_they_say():
    """A run by layers is the model; the published FastV keeps what the preset keeps."""
    model = gpu.build_model("llava-tiny", torch.device("cpu"), torch.float32)
    for images in (1, 2):
        bench = gpu._Bench.of(SMALL, model, images)
        variants = bench.variants()
        whole = bench.lengths(Policy())
        assert whole == [64 * images + SMALL.text] * 4
        expected = gpu._prefill(model, bench.inputs).logits[:, -1]
        logits, cache = gpu.short_run(model, whole, **bench.inputs)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        fastv = gpu._prefill(variants["fastv"], bench.inputs)
        logits, cache = variants["as published: fastv"](**bench.inputs)
        torch.testing.assert_close(logits, fastv.logits[:, -1], atol=1e-4, rtol=0)
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert lengths == bench.lengths(bench.policies["fastv"])
        _, cache = variants["ideal short run of fastv"](**bench.inputs)
        assert [layer.keys.shape[2] for layer in cache.layers] == lengths


def test_an_ideal_short_run_computes_the_same_in_onnx_runtime(tmp_path):
    model = gpu.build_model("llava-tiny", torch.device("cpu"), torch.float32)
    bench = gpu._Bench.of(SMALL, model, 1)
    lengths = bench.lengths(bench.policies["fastv"])
    logits, cache = gpu.short_run(model, lengths, **bench.inputs)
    session = gpu.onnx_short_run(model, lengths, bench.inputs, tmp_path)
    found = {name: as_tensor(value) for name, value in session(bench.inputs).items()}
    torch.testing.assert_close(found["logits"], logits, atol=1e-4, rtol=0)
    for i, layer in enumerate(cache.layers):
        torch.testing.assert_close(found[f"present.{i}.key"], layer.keys, atol=1e-4, rtol=0)


def test_reductions_are_measured_in_both_runtimes(monkeypatch):
    rows = operators.reduction_rows(8, 64)
    few = {name: rows[name] for name in ("pool (avg_pool)", "max_min (divprune)")}
    monkeypatch.setattr(reductions, "reduction_rows", lambda keep, visual: few)
    saved: list[Any] = []
    found = reductions.measure("llava-tiny", "cpu", 1, saved.append, ((8, 64),))
    assert saved == [found] and reductions.table(found).row_count == 2
    for row in found["reductions"]["8 of 64"].values():
        # Picks are a loop, and no nodes of their own.
        assert 5 < row["nodes"] < 80 and row["pytorch_ms"] > 0 and row["onnxruntime_ms"] > 0


@pytest.mark.parametrize(
    "name", ["prune (fastv)", "windows, merge (vscan)", "distinct (vispruner)"]
)
def test_a_reduction_by_itself_is_that_of_a_model(name):
    row = operators.reduction_rows(8, 64)[name]
    given = reductions._inputs("llava-tiny", "cpu", 64, row.reduction)
    known = {key: given[key.partition("@")[0]] for key in required_features(row.reduction)}
    right = static_reduce(row.reduction, row.count(64), given["tokens"], None, known).tokens
    module = reductions.lowered(row.reduction, row.count(64), given)
    given.pop(reductions.GRID, None)
    assert torch.equal(module(**given)["reduced"], right)


def test_latency_of_random_policies_is_predicted_and_measured():
    saved: list[dict] = []
    settings = latency.Settings(shape="llava-tiny", runtimes=["torch"], text=4, policies=3)
    found = latency.measure(settings, saved.append)
    rows = found["runtimes"]["torch"]["policies"]
    assert len({row["policy"] for row in rows}) == 3
    assert all(row["predicted_ms"] > 0 and row["measured_ms"] > 0 for row in rows)
    assert found["runtimes"]["torch"]["median_error"] >= 0 and saved == [found]
    assert latency.table(found).row_count == 4


def test_an_elastic_export_is_measured_beside_a_static_one(monkeypatch):
    """Exporting takes long and has tests of its own."""
    exported: list[Any] = []
    monkeypatch.setattr(
        elastic, "export_onnx", lambda reduced, *_, elastic, **__: exported.append(reduced)
    )
    monkeypatch.setattr(elastic.OnnxModel, "from_pretrained", lambda *_: exported[-1])
    saved: list[Any] = []
    found = elastic.measure("llava-tiny", "cpu", 2, saved.append)
    assert saved == [found]
    assert found["elastic_over_static"] > 0 and set(found["prefill_ms"]) == {"static", "elastic"}
    assert found["settings"]["keep"] == 64 // 9


def test_steps_in_place_are_measured_beside_those_that_copy(monkeypatch):
    """Exporting takes long, and caches have tests of their own."""
    exported: list[Any] = []

    def opened(*_):
        return Mock(side_effect=exported[-1], _decode=SimpleNamespace(buffers={"a buffer"}))

    monkeypatch.setattr(caches, "export_onnx", lambda reduced, *_, **__: exported.append(reduced))
    monkeypatch.setattr(caches.OnnxModel, "from_pretrained", opened)
    saved: list[Any] = []
    found = caches.measure("llava-tiny", 2, saved.append)
    assert saved[-1] == found and [step["rows"] for step in found["steps"]] == [1, 4, 1, 4]
    assert [len(each.policy.reductions) for each in exported] == [0, 1]
    for step in found["steps"]:
        assert set(step["ms"]) == {"pytorch", "copying", "in place"}
        assert all(ratio > 0 for ratio in step["in_place"].values())


def test_exports_are_measured_beside_those_of_transformers(monkeypatch):
    """Exporting takes long and has tests of its own."""

    def write(folder, count):
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(count))

    monkeypatch.setattr(export, "_theirs", lambda model, inputs, folder: write(folder, 100))
    monkeypatch.setattr(export, "_ours", lambda model, inputs, policy, folder: write(folder, 50))
    saved: list[Any] = []
    found = export.measure("llava-tiny", 2, saved.append)
    assert {name: one["bytes_over_transformers"] for name, one in found["exports"].items()} == {
        "transformers": 1,
        "unreduced": 0.5,
        "a ninth after decoder.1": 0.5,
    }
    assert all(one["seconds"] > 0 for one in found["exports"].values()) and len(saved) == 2
    assert export._table(found).row_count == 3
