"""The real onnxruntime-genai on exported folders: its greedy tokens are those of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from families import prompts, shared

from deos_fx.exporters.genai import export_genai
from deos_fx.exporters.genai_inputs import genai_inputs
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

# It depends on onnxruntime, which must not be in one environment with onnxruntime-gpu.
engine: Any = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

TOKENS = 24
MERGE = Reduction("projector", 9, scores={"feature_norm": 1}, gain=1, position="compact")


def _generated(folder: Path, inputs: Mapping[str, Any]) -> list[int]:
    """Return the new tokens of the engine."""
    model = engine.Model(str(folder))
    params = engine.GeneratorParams(model)
    params.set_search_options(do_sample=False)
    generator = engine.Generator(model, params)
    tensors = engine.NamedTensors()
    for name, value in genai_inputs(folder, inputs).items():
        tensors[name] = value
    generator.set_inputs(tensors)
    tokens = []
    while not generator.is_done() and len(tokens) < TOKENS:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def _expected(reduced: ReducedModel, inputs: Mapping[str, Any]) -> list[int]:
    """Return the new tokens of PyTorch, to the first one of padding, after which engines stop."""
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": tiny.PAD}
    return reduced.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def test_two_images_reduced_in_the_tower_and_at_the_projector(tmp_path: Path) -> None:
    model = tiny.shared_llava(2)
    tower = Reduction("vision.0", 30, scores={"feature_norm": 1})
    reduced = ReducedModel(model, Policy((tower, MERGE)))
    folder = export_genai(reduced, tmp_path / "x", tiny.inputs(model, 1, images=2))
    for seed in range(2):
        prompt = tiny.inputs(model, 1, images=2, text=5 + seed, layout="between", seed=seed)
        assert _generated(folder, prompt) == _expected(reduced, prompt)


def test_tiles_with_ends_of_rows(tmp_path: Path) -> None:
    """Their encoder reads sizes, and their ends of rows are placeholders that stay."""
    prompt = prompts("llava_next")
    reduced = ReducedModel(shared("llava_next", 2), Policy((MERGE,)))
    folder = export_genai(reduced, tmp_path / "x", prompt)
    prompt["pixel_values"] = -prompt["pixel_values"]
    assert _generated(folder, prompt) == _expected(reduced, prompt)
