"""What is traced for an export, run by PyTorch, against the reduced model; see in_pytorch.py."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from closeness import assert_close
from families import START, prompts
from in_pytorch import without_tracing
from onnx_families import generate, reduced
from torch import Tensor
from transformers import DynamicCache

from deos_fx.exporters.genai import export_genai
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.exporters.shared import ort_value
from deos_fx.models.upstream import CACHE
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

ENDS = slice(-3, None)
"""Of prompts: no padding."""


@pytest.fixture(autouse=True, scope="module")
def stands() -> Iterator[None]:
    with without_tracing():
        yield


def assert_same(runtime: OnnxModel, model: ReducedModel, batch: dict[str, Tensor]) -> None:
    """Compare what they say of a prompt, and after it."""
    (tokens, logits), (words, expected) = (generate(each, batch, 3) for each in (runtime, model))
    assert torch.equal(tokens, words)
    assert_close(logits, expected)


FAMILIES = {
    "qwen2_5_vl": "an encoder that reads sizes, positions with coordinates",
    "lfm2_vl": "states of convolutions",
    "video_llava": "images by their former name",
    "deepseek_vl_hybrid": "images in two resolutions",
    "kimi_k25": "values that are narrower than keys",
    "molmo2": "patches that are counted through a batch",
}


class Told:
    """What an export tells of its progress; fails unless every stage goes from 0 to its end."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done, total))

    def stages(self) -> list[str]:
        found = []
        for stage, of_stage in itertools.groupby(self.seen, lambda one: one[0]):
            _, done, total = zip(*of_stage, strict=True)
            # How many graphs there are is known after the first is begun.
            assert [*done] == [*range(total[-1] + 1)] and {*total} <= {1, total[-1]}
            found.append(stage)
        return found


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    model = reduced(name)
    if name == "qwen2_5_vl":
        # Groups of patches in its tower as well.
        tower = Reduction("vision.0", 0.75, scores={"feature_norm": 1.0})
        model = ReducedModel(model.model, Policy((tower, *model.policy.reductions)))
    export_onnx(model, tmp_path / "x", prompts(name, 1), verify=False)
    assert_same(OnnxModel.from_pretrained(tmp_path / "x"), model, prompts(name, 3))


def test_branches_of_a_model_are_those_of_the_export(tmp_path: Path) -> None:
    """Ovis2 asks whether there are marks of an image; a prompt without them takes another path."""
    model, inputs = reduced("ovis2"), prompts("ovis2", 2)
    export_onnx(model, tmp_path / "x", prompts("ovis2", 1), verify=False)
    runtime = OnnxModel.from_pretrained(tmp_path / "x")
    assert_same(runtime, model, inputs)
    bare = inputs["input_ids"].clone()
    bare[bare == START] = 5
    with pytest.raises(ValueError, match="asks whether they have tokens of some kind"):
        runtime(**inputs | {"input_ids": bare})


def test_spaces_of_a_tower_and_a_decoder(tmp_path: Path) -> None:
    policy = Policy(
        (
            Reduction("vision.0", 48, scores={"cls_attention": 1}, gain=1, mass_bias=1),
            Reduction("projector", 20, gain=1, mass_bias=0.5),
            Reduction("decoder.0", 9, position="grid"),
        )
    )
    model = ReducedModel(tiny.shared_llava(2), policy)
    # Checked as every export is, for prompts of another length.
    export_onnx(model, tmp_path / "x", tiny.inputs(model.model, 1, 2))
    runtime = OnnxModel.from_pretrained(tmp_path / "x")
    batch = tiny.inputs(model.model, 3, 2, text=4)
    text = {name: batch[name][:, -5:] for name in ("input_ids", "attention_mask")}
    for given in (batch, text):
        outputs = [each(**given) for each in (runtime, model)]
        assert_close(*(output.logits[:, ENDS] for output in outputs))
        # A turn of several tokens, and one of one.
        mask = given["attention_mask"]
        for words in (torch.tensor([[3, 4], [5, 6], [7, 8]]), torch.tensor([[3], [9], [4]])):
            mask = torch.cat([mask, torch.ones_like(words)], dim=1)
            more = {"input_ids": words, "attention_mask": mask}
            outputs = [
                each(**more, **{CACHE: output[CACHE]})
                for each, output in zip((runtime, model), outputs, strict=True)
            ]
            assert_close(*(output.logits for output in outputs))
    assert runtime.device == torch.device("cpu")
    # Pixels of any precision; logits of the last token alone.
    precise = batch | {"pixel_values": batch["pixel_values"].double()}
    last = runtime(**precise, logits_to_keep=1).logits
    assert_close(last, runtime(**batch).logits[:, -1:])
    text["input_ids"] = torch.full_like(text["input_ids"], tiny.IMAGE)
    with pytest.raises(ValueError, match="The prompt has no image, or no place for it"):
        runtime(**text)
    with pytest.raises(ValueError, match=f"{CACHE} is a DynamicCache; pass None, or what an"):
        runtime(**batch, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="exported graphs always use a cache"):
        runtime.generate(**batch, use_cache=False)


def test_prompts_that_end_in_an_image(tmp_path: Path) -> None:
    model = ReducedModel(tiny.shared_llava(2), Policy((Reduction("decoder.0", 9),)))
    ends = tiny.inputs(model.model, 2, layout="first", padding=None)
    ends["input_ids"] = ends["input_ids"].roll(-tiny.VISUAL, dims=1)
    export_onnx(model, tmp_path / "x", ends, verify=False)
    runtime = OnnxModel.from_pretrained(tmp_path / "x")
    assert_same(runtime, model, ends)
    with pytest.raises(ValueError, match="There are prompts that end in text"):
        runtime(**tiny.inputs(model.model, 1))


def test_a_model_without_reductions(tmp_path: Path) -> None:
    model = ReducedModel(tiny.shared_llava(2), Policy())
    export_onnx(model, tmp_path / "x", verify=False)
    runtime = OnnxModel.from_pretrained(tmp_path / "x")
    assert_same(runtime, model, tiny.inputs(model.model, 2))


def test_parts_for_an_engine(tmp_path: Path) -> None:
    merge = Reduction("projector", 9, gain=1, position="compact", mass_bias=0.0)
    model = ReducedModel(tiny.shared_llava(2), Policy((merge,)))
    # Compared with the reduced model, as every export is.
    export_genai(model, tmp_path / "x", progress=(told := Told()))
    assert told.stages() == ["trace", "fuse", "write", "check"]
    config, manifest = (
        json.loads((tmp_path / "x" / f"{name}.json").read_text())
        for name in ("genai_config", "deos_fx")
    )
    assert config["model"]["decoder"]["session_options"]["provider_options"] == []
    assert manifest["images"] == [{"placeholders": tiny.VISUAL, "left": 9}]


def test_what_an_encoder_reads_of_the_pixels_is_that_of_the_export() -> None:
    def encoder(own: dict[str, Tensor]) -> dict[str, Any]:
        real = own["pixel_values"].flatten(1).any(dim=1)
        given = {"image_features_0": own["pixel_values"].mean(dim=(2, 3)), "read_0": real.int()}
        return {name: ort_value(value) for name, value in given.items()}

    runtime: Any = OnnxModel.__new__(OnnxModel)
    runtime._constants = {"read_0": torch.ones(2, dtype=torch.int32)}
    encoder_of: Any = encoder
    encoder_of.inputs = {"pixel_values": torch.float32}
    pixels = torch.randn(6, 3, 4, 4)
    found = runtime._encode(encoder, {"pixel_values": pixels, "input_ids": None}, 3)
    assert_close(found["image_features_0"], pixels.mean(dim=(2, 3)))
    pixels[3] = 0
    with pytest.raises(ValueError, match="treats some images in another way than those"):
        runtime._encode(encoder, {"pixel_values": pixels}, 3)


def test_counts_that_are_inputs(tmp_path: Path) -> None:
    steps = (
        Reduction("projector", 24, gain=1, mass_bias=0.5),
        Reduction("decoder.0", 9, position="compact"),
    )
    given = tiny.inputs(tiny.shared_llava(2), 1, 2)

    def with_counts(*keep: Any) -> ReducedModel:
        chosen = (replace(step, keep=count) for step, count in zip(steps, keep, strict=True))
        return ReducedModel(tiny.shared_llava(2), Policy(tuple(chosen)))

    # Compared for the fewest and the most of them.
    export_onnx(with_counts(24, 9), tmp_path / "x", given, elastic=True, progress=(told := Told()))
    assert told.stages() == ["trace", "fuse", "write", "check"]
    runtime = OnnxModel.from_pretrained(tmp_path / "x")
    assert_same(runtime.keeping(0.5, 2), with_counts(0.5, 2), given)
