"""Exports for onnxruntime-genai, without the engine; test_genai_engine.py runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import prompts, shared
from torch import Tensor

from deos_fx.contents import GENAI_FILES, write_record
from deos_fx.exporters.genai import export_genai
from deos_fx.exporters.genai_files import FORMAT, VERSION, genai_config
from deos_fx.exporters.genai_inputs import genai_inputs
from deos_fx.exporters.graphs.example import example_of
from deos_fx.exporters.graphs.image_encoder import record
from deos_fx.exporters.graphs.parts import FEATURES, Vision, part_graphs
from deos_fx.exporters.manifest import IMAGES
from deos_fx.files import write_tensors
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

KEPT = 9
MERGE = Reduction("projector", KEPT, scores={"feature_norm": 1}, gain=1, position="compact")


@pytest.mark.parametrize(
    ("reductions", "reason"),
    [
        ([MERGE, Reduction("decoder.0", 4)], "reduces at decoder.0, but onnxruntime-genai"),
        ([replace(MERGE, position="keep")], "has the position rule 'keep'"),
        ([replace(MERGE, mass_bias=1.0)], "has a mass_bias"),
    ],
)
def test_policies_that_the_engine_cannot_run_are_refused(
    tmp_path: Path, reductions: list[Reduction], reason: str
) -> None:
    reduced = ReducedModel(tiny.shared_llava(2), Policy(tuple(reductions)))
    with pytest.raises(ValueError, match=reason):
        export_genai(reduced, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_policy_that_reads_the_text_is_refused(tmp_path: Path) -> None:
    policy = Policy((replace(MERGE, scores={"text_relevance": 1}),))
    reduced = ReducedModel(tiny.shared_llava(2), policy)
    with pytest.raises(ValueError, match="compares visual tokens with the text of the prompt"):
        export_genai(reduced, tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen2_5_vl", "counts images by time, row and column"),
        ("gemma3", "see a window, or the tokens of an image see each other"),
        ("pixtral", "have text between the tokens of an image"),
    ],
)
def test_models_that_the_engine_cannot_run_are_refused(
    tmp_path: Path, name: str, reason: str
) -> None:
    reduced = ReducedModel(shared(name, 2), Policy((MERGE,)))
    with pytest.raises(ValueError, match=f"onnxruntime-genai cannot run this model: .* {reason}"):
        export_genai(reduced, tmp_path / "x", prompts(name))


def test_images_that_take_another_branch_give_nan() -> None:
    """Idefics leaves out images that are all zeros, and the graph is one without such images."""
    pixels = tiny.inputs(tiny.shared_llava(2), 1, images=2)["pixel_values"]

    def encode(pixels: Tensor) -> list[Tensor]:
        return [pixels[(pixels != 0).flatten(1).any(dim=1)]]

    recorded = record(encode, pixels)
    vision = Vision(recorded, recorded(pixels)[1])
    assert torch.equal(vision(pixels)[FEATURES], pixels)
    pixels[1] = 0
    assert vision(pixels)[FEATURES].isnan().all()


@torch.no_grad()
def test_the_config_says_what_the_engine_asks() -> None:
    model = tiny.shared_llava(2)
    parts = part_graphs(ReducedModel(model, Policy((MERGE,))), example_of(model, None, 8))
    assert parts.images == [(tiny.VISUAL, KEPT)]
    config = genai_config(model, parts, "cuda")["model"]
    assert config["vision"]["num_visual_tokens"] == KEPT
    decoder = config["decoder"]
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (2, 16)
    assert decoder["session_options"]["provider_options"] == [{"cuda": {}}]
    on_cpu = genai_config(model, parts, "cpu")["model"]["decoder"]["session_options"]
    assert on_cpu["provider_options"] == []
    named = [config[part]["filename"] for part in ("vision", "embedding", "decoder")]
    assert set(named) < set(GENAI_FILES)


def test_a_prompt_loses_as_many_placeholders_as_tokens_are_dropped(tmp_path: Path) -> None:
    model = tiny.shared_llava(2)
    batch: dict[str, Any] = tiny.inputs(model, 1, images=2, layout="between", seed=1)
    folder = tmp_path / "x"
    folder.mkdir()
    manifest = {
        "deos_fx": FORMAT,
        "version": VERSION,
        "packages": {},
        "image_token": tiny.IMAGE,
        "pixels": list(batch["pixel_values"].shape),
        "images": [{"placeholders": tiny.VISUAL, "left": left} for left in (KEPT, 5)],
    }
    write_record(folder, manifest)
    given = genai_inputs(folder, batch)
    (ids,), (left,) = batch["input_ids"], torch.from_numpy(given["input_ids"])
    # Two runs of placeholders, of these lengths, between the same words.
    assert left[left != tiny.IMAGE].tolist() == ids[ids != tiny.IMAGE].tolist()
    edges = torch.nn.functional.pad((left == tiny.IMAGE).int(), (1, 1)).diff().nonzero()[:, 0]
    assert edges.diff()[::2].tolist() == [KEPT, 5]
    assert given["num_image_tokens"].tolist() == [KEPT + 5]
    assert torch.equal(torch.from_numpy(given["pixel_values"]), batch["pixel_values"])
    # Sizes of images are those of the export, in any type.
    write_tensors(folder / IMAGES, {"image_sizes": torch.tensor([[64, 64]] * 2)})
    write_record(folder, manifest)
    sizes = {"image_sizes": torch.tensor([[64, 64]] * 2, dtype=torch.int32)}
    assert genai_inputs(folder, batch | sizes).keys() == given.keys()
    for other in ({}, {"image_sizes": torch.tensor([[64, 32]] * 2)}):
        with pytest.raises(ValueError, match="image_sizes is not that of the images this model"):
            genai_inputs(folder, batch | other)
    for wrong, reason in (
        (tiny.inputs(model, 2, images=2), "one prompt without padding"),
        (batch | {"attention_mask": ids[None] != ids[0]}, "one prompt without padding"),
        (tiny.inputs(model, 1, images=1), "exported for 128"),
        (batch | {"pixel_values": batch["pixel_values"][:1]}, r"pixel_values \[1, 3, 64, 64\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            genai_inputs(folder, wrong)
    with pytest.raises(FileNotFoundError, match="not a folder that deos_fx.export_genai wrote"):
        genai_inputs(tmp_path, batch)
