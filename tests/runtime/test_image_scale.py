"""A policy with a scale of images: the model and its processor go together, in every place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fails, run
from closeness import assert_close
from families import shared
from in_pytorch import without_tracing
from masked import assert_pruning_is_masking
from PIL import Image
from real_processors import noise, write_qwen
from torch.utils.flop_counter import FlopCounterMode

from deos_fx import OnnxModel, Policy, ReducedModel, Reduction, export_onnx, reference, transform
from deos_fx.data import Record, batches

HALF = Policy(image_scale=0.5)
IMAGE = noise(64, 48)
ASKED = Record(IMAGE, "what is at the top left")
# What PIL makes of the image at half of its sides.
SMALL = Record(IMAGE.resize((32, 24), Image.Resampling.BICUBIC), ASKED.prompt)


@pytest.fixture(scope="module", name="qwen")
def _qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, and the model and the processor in it."""
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *write_qwen(folder, max_pixels=128 * 128)


def test_logits_are_those_of_the_resized_image(qwen: Any) -> None:
    _, model, processor = qwen
    reduced = ReducedModel(model, HALF)
    (inputs,) = batches(reduced.processor(processor), [ASKED], 1)
    (small,) = batches(processor, [SMALL], 1)
    with torch.no_grad():
        assert torch.equal(reduced(**inputs).logits, model(**small).logits)


def test_reductions_apply_to_what_enters(qwen: Any) -> None:
    _, model, processor = qwen
    reduction = Reduction("decoder.0", 0.5, scores={"feature_norm": 1.0})
    reduced = ReducedModel(model, Policy((reduction,), image_scale=0.5))
    (inputs,) = batches(reduced.processor(processor), [ASKED], 1)
    assert_pruning_is_masking(model, reduced, inputs)
    (site,) = reduced.explain(**inputs)
    # 48 visual tokens of the whole image.
    assert "6 of 12 visual tokens" in str(site)


def test_costs_are_those_of_what_enters(qwen: Any) -> None:
    _, model, processor = qwen
    # The counter does not know the attention kernels of CPUs.
    model.set_attn_implementation("eager")
    reduced = ReducedModel(model, HALF)
    (inputs,) = batches(reduced.processor(processor), [ASKED], 1)
    reduced(**inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reduced(**inputs)
    cost = reduced.cost(**inputs).after
    model.set_attn_implementation("sdpa")
    assert cost.visual_tokens == 12
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_processor_that_was_forgotten(qwen: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, model, processor = qwen
    (inputs,) = batches(processor, [ASKED], 1)
    with caplog.at_level(logging.WARNING, "deos_fx"):
        ReducedModel(model, Policy(image_scale=0.625))(**inputs)
    assert "at 0.625 of their size" in caplog.text
    assert "reduced.processor(processor)" in caplog.text


def test_on_the_command_line(qwen: Any, tmp_path: Path) -> None:
    folder, model, processor = qwen
    IMAGE.save(tmp_path / "image.png")
    asked = ("--image", tmp_path / "image.png", "--prompt", ASKED.prompt, "--max-new-tokens", 4)
    (small,) = batches(processor, [SMALL], 1)
    ids = model.generate(**small, max_new_tokens=4, do_sample=False)
    text = processor.decode(ids[0, small["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run("generate", folder, *asked, "--image-scale", 0.5).strip() == text.strip()
    # Saved, the policy has the scale, and the processor beside it has none.
    run("transform", folder, tmp_path / "reduced", "--image-scale", 0.5)
    assert Policy.load(tmp_path / "reduced" / "policy.json").image_scale == 0.5
    settings = [
        json.loads((place / "processor_config.json").read_text())["image_processor"]
        for place in (folder, tmp_path / "reduced")
    ]
    assert settings[1].items() >= settings[0].items()
    assert run("generate", tmp_path / "reduced", *asked).strip() == text.strip()
    # A quarter of the tokens by smaller images and a preset together; at most 16 x 16 tokens enter.
    options = ("--image-scale", 0.75, "--preset", "merge", "--budget", "25%", "--json")
    costs = json.loads(run("inspect", folder, *options))["costs"]
    assert costs["before"]["visual_tokens"] == 16 * 16
    assert costs["after"]["visual_tokens"] == pytest.approx(16 * 16 / 4, abs=1)


def test_models_of_one_size_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    message = fails("transform", reference.WEIGHTS, tmp_path / "out", "--image-scale", 0.5)
    assert "image_scale=0.5 changes nothing: a llava model takes one size" in message
    assert not (tmp_path / "out").exists()


def test_models_of_one_size_are_refused_with_the_policy() -> None:
    with pytest.raises(ValueError, match="a llava model takes one size of images, of which it"):
        transform(shared("llava"), policy=HALF)
    # A processor of this kind cuts images into tiles.
    assert ReducedModel(shared("internvl"), HALF).policy == HALF


def test_an_export_is_for_what_enters(qwen: Any, tmp_path: Path) -> None:
    _, model, processor = qwen
    reduced = ReducedModel(model, HALF)
    (inputs,) = batches(reduced.processor(processor), [ASKED], 1)
    with without_tracing():
        export_onnx(reduced, tmp_path / "onnx", example_inputs=inputs, verify=False)
        onnx_model = OnnxModel.from_pretrained(tmp_path / "onnx", "cpu")
    (own,) = batches(onnx_model.processor(processor), [ASKED], 1)
    with torch.no_grad():
        assert_close(onnx_model(**own).logits, reduced(**own).logits)
    (whole,) = batches(processor, [ASKED], 1)
    with pytest.raises(ValueError, match="have \\[48\\] image tokens each"):
        onnx_model(**whole)
