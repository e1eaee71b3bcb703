"""What is traced for an export, run by PyTorch, against the reduced model; see in_pytorch.py."""

from __future__ import annotations

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
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    model = reduced(name)
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
    last = runtime(**batch, logits_to_keep=1).logits
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


def test_parts_for_an_engine(tmp_path: Path) -> None:
    merge = Reduction("projector", 9, gain=1, position="compact", mass_bias=0.0)
    model = ReducedModel(tiny.shared_llava(2), Policy((merge,)))
    # Compared with the reduced model, as every export is.
    export_genai(model, tmp_path / "x")
    manifest = json.loads((tmp_path / "x" / "deos_fx.json").read_text())
    assert manifest["images"] == [{"placeholders": tiny.VISUAL, "left": 9}]


def test_counts_that_are_inputs(tmp_path: Path) -> None:
    steps = (
        Reduction("projector", 24, gain=1, mass_bias=0.5),
        Reduction("decoder.0", 9, position="compact"),
    )
    given = tiny.inputs(tiny.shared_llava(2), 1, 2)

    def with_counts(*keep: Any) -> ReducedModel:
        chosen = (replace(step, keep=count) for step, count in zip(steps, keep, strict=True))
        return ReducedModel(tiny.shared_llava(2), Policy(tuple(chosen)))

    export_onnx(with_counts(24, 9), tmp_path / "x", given, elastic=True, verify=False)
    runtime = OnnxModel.from_pretrained(tmp_path / "x")
    for keep in ((24, 9), (0.5, 2)):
        assert_same(runtime.keeping(*keep), with_counts(*keep), given)
