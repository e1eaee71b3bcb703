"""Families beyond LLaVA in ONNX Runtime: two that are exported here stand for the others.

gemma3 has an encoder inside the prefill graph, windows and blocks of image tokens in masks;
qwen2_5_vl an encoder of its own graph that reads sizes, and positions with three coordinates.
`onnx_families.check_onnx` does the same for any family; the table of families is made with it.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import onnx
import pytest
import torch
from closeness import assert_onnx_close
from families import FAMILIES, IMAGE, prompts, shared
from onnx_families import LAYERS, assert_a_chat_is_the_same, check_onnx, generate, reduced

from deos_fx.exporters.genai import export_genai
from deos_fx.exporters.graphs.example import example_of
from deos_fx.exporters.graphs.image_encoder import record
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel

EXPORTED = ("gemma3", "qwen2_5_vl")
both = pytest.mark.parametrize("name", EXPORTED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of an exported family, exported on first use."""

    @functools.cache
    def export(name: str) -> Any:
        target = tmp_path_factory.mktemp(name) / "x"
        # Tests compare it with other prompts than its own check would.
        return export_onnx(reduced(name), target, prompts(name, 1), verify=False)

    return export


@functools.cache
def _runtime(folder: Any) -> OnnxModel:
    return OnnxModel.from_pretrained(folder, "cpu")


@both
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_equals_pytorch(folder: Any, name: str, batch: int) -> None:
    """For more tokens than the window of gemma3 is long, so that the prompt leaves it."""
    inputs = prompts(name, batch)
    tokens, logits = generate(_runtime(folder(name)), inputs, 30)
    expected_tokens, expected = generate(reduced(name), inputs, 30)
    assert torch.equal(tokens, expected_tokens)
    assert_onnx_close(logits, expected)


@both
def test_a_chat_is_the_same(folder: Any, name: str) -> None:
    batch, extra = prompts(name, 4), FAMILIES[name].extra
    assert_a_chat_is_the_same(reduced(name), _runtime(folder(name)), batch, extra)


@both
def test_a_call_equals_pytorch_and_can_be_continued(folder: Any, name: str) -> None:
    inputs, ends = prompts(name, 2), slice(-5, None)
    outputs = [model(**inputs) for model in (_runtime(folder(name)), reduced(name))]
    assert_onnx_close(*(output.logits[:, ends] for output in outputs))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    word = torch.tensor([[5], [6]])
    again = [
        model(input_ids=word, attention_mask=mask, **{CACHE: output[CACHE]}).logits
        for model, output in zip((_runtime(folder(name)), reduced(name)), outputs, strict=True)
    ]
    assert_onnx_close(*again)


@both
def test_graphs_have_no_data_dependent_shapes(folder: Any, name: str) -> None:
    for path in folder(name).glob("*.onnx"):
        kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert not kinds & {"NonZero", "Loop", "Scan", "If", "ScatterND", "Unique", "Compress"}


def test_positions_have_coordinates(folder: Any) -> None:
    manifest = json.loads((folder("qwen2_5_vl") / "deos_fx.json").read_text())
    assert manifest["coordinates"] == 3
    assert set(manifest["graphs"]) == {"prefill", "extend", "decode", "image_encoder"}
    graph = onnx.load(folder("qwen2_5_vl") / "decode.onnx", load_external_data=False).graph
    (positions,) = (value for value in graph.input if value.name == "position_ids")
    axes = [axis.dim_param or axis.dim_value for axis in positions.type.tensor_type.shape.dim]
    assert axes == [3, "batch", 1]


# *** calls that the graphs are not for ***


def test_images_of_another_size_are_refused(folder: Any) -> None:
    runtime, inputs = _runtime(folder("qwen2_5_vl")), prompts("qwen2_5_vl", 1)
    with pytest.raises(ValueError, match=r"image_grid_thw is \[\[1, 16, 8\]\].*Export it again"):
        runtime(**inputs | {"image_grid_thw": torch.tensor([[1, 16, 8]])})
    with pytest.raises(ValueError, match="lacks image_grid_thw"):
        runtime(**{name: value for name, value in inputs.items() if name != "image_grid_thw"})


def test_other_inputs_than_exported_are_refused(folder: Any) -> None:
    """Who sees whom among the tokens of an image depends on them."""
    runtime, inputs = _runtime(folder("gemma3")), prompts("gemma3", 1)
    ids = inputs["input_ids"].clone()
    ids[0, -2] = IMAGE
    with pytest.raises(ValueError, match=r"\[65\] image tokens each.*with 64"):
        runtime(**inputs | {"input_ids": ids})
    kinds = inputs.pop("token_type_ids")
    with pytest.raises(ValueError, match="lacks token_type_ids.*Export it again"):
        runtime(**inputs)
    with pytest.raises(ValueError, match="has labels"):
        runtime(**inputs, token_type_ids=kinds, labels=inputs["input_ids"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("pixtral", "takes images of many sizes"), ("paligemma", "takes token_type_ids")],
)
def test_some_models_need_an_example(name: str, reason: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=f"{reason}: give example_inputs"):
        export_onnx(reduced(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_examples_with_more_than_text_and_images_are_refused(tmp_path: Any) -> None:
    inputs = prompts("internvl", 1)
    with pytest.raises(ValueError, match="has audio, which exported graphs do not take"):
        export_onnx(reduced("internvl"), tmp_path / "out", inputs | {"audio": torch.ones(3)})


def test_what_convolutions_read_again_is_handed_on(folder: Any) -> None:
    """Over a padded batch, two turns of a chat, and a text of its own."""
    target, model = folder("lfm2_vl"), reduced("lfm2_vl")
    layers = json.loads((target / "config.json").read_text())["text_config"]["layer_types"]
    assert "conv" in layers
    batch = prompts("lfm2_vl", 3)
    steps, words = 6, torch.randint(1, 100, (3, 3), generator=torch.manual_seed(5))
    answers, turns = [], []
    for answering in (model, _runtime(target)):
        settings = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True}
        first = answering.generate(**{k: v.clone() for k, v in batch.items()}, **settings)
        ids = torch.cat([first.sequences, words], dim=1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, steps + 3), value=1)
        turn = answering.generate(
            input_ids=ids, attention_mask=mask, **{CACHE: first[CACHE]}, **settings
        )
        alone = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        answers.append([generate(answering, given, steps) for given in (batch, alone)])
        turns.append(turn.sequences)
    assert torch.equal(*turns)
    for (tokens, logits), (expected_tokens, expected) in zip(*answers[::-1], strict=True):
        assert torch.equal(tokens, expected_tokens)
        assert_onnx_close(logits, expected)


def test_recurrent_states_are_not_exported(tmp_path: Any) -> None:
    # The second has the patches of all images side by side, in one row.
    for name in ("qwen3_5", "minicpmv4_6"):
        empty = ReducedModel(shared(name, LAYERS), Policy())
        with pytest.raises(ValueError, match="has layers with a recurrent state"):
            export_onnx(empty, tmp_path / "x", prompts(name))
    with pytest.raises(ValueError, match="has layers that choose keys by an index"):
        export_onnx(ReducedModel(shared("dots3_note"), Policy()), tmp_path / "x")
    with pytest.raises(ValueError, match="Lfm2Vl.* the engine hands on keys and values alone"):
        export_genai(ReducedModel(shared("lfm2_vl", LAYERS), Policy()), tmp_path / "x")
    assert not [*tmp_path.iterdir()]


def test_what_has_no_onnx_form_is_refused(tmp_path: Any, monkeypatch: Any) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no such operator\nand 300 lines more")

    monkeypatch.setattr("transformers.exporters.exporter_onnx.OnnxExporter.export_program", fail)
    with pytest.raises(ValueError, match=r"\(RuntimeError: no such operator\). Run the reduced"):
        export_onnx(ReducedModel(shared("internvl", LAYERS), Policy()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# *** what is traced ***


def test_an_example_is_two_prompts_like_the_first() -> None:
    given = prompts("qwen2_vl", 2)
    example = example_of(shared("qwen2_vl", LAYERS), given, 5)
    real = given["attention_mask"][0].bool()
    assert torch.equal(example.inputs["input_ids"][1, :-5], given["input_ids"][0][real])
    assert example.inputs["position_ids"].shape == (3, 2, real.sum() + 5)
    assert torch.equal(example.inputs["pixel_values"][:128], example.inputs["pixel_values"][128:])
    assert example.images["image_grid_thw"].tolist() == [[1, 8, 16]]
    assert example.placeholders == 32


def test_what_an_encoder_reads_of_pixels_is_given_back() -> None:
    sizes = torch.tensor([2, 3])

    def encode(pixels: torch.Tensor) -> list[torch.Tensor]:
        real = pixels.abs().sum(dim=(1, 2)) > 0
        parts = pixels[real].flatten(1).split(sizes.tolist(), dim=1)
        return [parts[0] * int(real.sum())]

    pixels = torch.randn(2, 1, 5)
    graph = record(encode, pixels)
    (features,), reads = graph(pixels)
    assert torch.equal(features, encode(pixels)[0])
    # Both images are real, and they are two; the sizes are constants.
    assert [read.tolist() for read in reads] == [[True, True], 2]
    pixels[1] = 0
    assert [read.tolist() for read in graph(pixels)[1]] == [[True, False], 1]


@pytest.mark.slow
def test_constants_that_fusions_forget_are_registered() -> None:
    assert check_onnx("idefics2", steps=3) == "yes"
