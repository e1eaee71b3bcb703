"""Groups of patches that are dropped in vision towers, in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from closeness import assert_onnx_close
from families import FAMILIES, built, prompts, shared
from onnx_families import LAYERS, generate
from onnxruntime import InferenceSession
from torch import Tensor
from torch.utils import _pytree as pytree

from deos_fx.exporters.graphs.example import example_of
from deos_fx.exporters.graphs.prefill import prefill_graph
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.inputs.items import IMAGES, encoding
from deos_fx.models.facts import facts_of
from deos_fx.models.families import features_of
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

MERGE: dict[str, Any] = {"gain": 1.0, "scores": {"mutual_attention": 1.0}}


def model_of(name: str) -> Any:
    if name != "qwen2_5_vl":
        return shared(name, LAYERS)
    config = copy.deepcopy(FAMILIES[name].config())
    # After the site, patches attend inside of their windows.
    config.vision_config.fullatt_block_indexes = [0]
    return built(config)


def in_pytorch(reduced: ReducedModel, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Features [T, d] and what is kept [1, K] of a prompt's images."""
    call = completed(Call.of(facts_of(reduced.model), given))
    reduced(**given)
    assert reduced.graphs.latest is not None
    encoder: Any = reduced.graphs.latest.get_submodule("image_encoder")
    output = encoder(**encoding(call.facts, call.inputs, IMAGES)[1])
    leaves = [x for x in pytree.tree_leaves(features_of(output)) if isinstance(x, Tensor)]
    return torch.cat([x.flatten(0, -2) for x in leaves]), output["left_in_tower"]["kept"]


# How many patches are left of a window, and of a tile, depends on the image.
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next"])
@torch.no_grad()
def test_an_encoder_keeps_what_it_keeps_in_pytorch(name: str, tmp_path: Path) -> None:
    reduced = ReducedModel(model_of(name), Policy((Reduction("vision.0", 0.5, **MERGE),)))
    given = prompts(name, 1)
    encoder = prefill_graph(reduced, example_of(reduced.model, given, 8), 2).encoder
    assert encoder is not None
    program = encoder.export()
    kinds = {node.op_type for node in program.graph}
    assert not kinds & {"NonZero", "Loop", "Scan", "If", "ScatterND", "Unique", "Compress"}
    onnx_ir.save(program, tmp_path / "encoder.onnx")
    session = InferenceSession(str(tmp_path / "encoder.onnx"))
    seen = set()
    for seed in range(2):
        # Other images than the one that the graph was traced with.
        noise = torch.Generator().manual_seed(seed)
        given["pixel_values"] = torch.randn(given["pixel_values"].shape, generator=noise)
        features, kept = in_pytorch(reduced, given)
        found = session.run(None, {"pixel_values": given["pixel_values"].numpy()})
        named = dict(zip([out.name for out in session.get_outputs()], found, strict=True))
        ours = [torch.from_numpy(named[f"image_features_{i}"]) for i in range(2)]
        assert torch.equal(ours[0], kept)
        whole = ours[1].flatten(0, -2)
        # Ends of rows, which are no visual tokens of an image, have one learned feature.
        of_image = (features != getattr(reduced.model.model, "image_newline", 0)).any(dim=1)
        assert_onnx_close(whole[of_image][kept[0]], features[of_image][kept[0]])
        seen.add(tuple(kept[0].tolist()))
    assert len(seen) == 2


@pytest.mark.slow
def test_a_reduced_tower_is_exported_and_deepstack_planes_with_it(tmp_path: Path) -> None:
    """A public runtime drops the planes without a word (onnxruntime-genai, pull request 2513)."""
    steps = Reduction("vision.0", 0.5, **MERGE), Reduction("decoder.0", 0.25, gain=1.0)
    model = copy.deepcopy(shared("qwen3_vl", LAYERS))
    reduced = ReducedModel(model, Policy(steps))
    export_onnx(reduced, tmp_path / "x", prompts("qwen3_vl", 1), verify=False)
    runtime = OnnxModel.from_pretrained(tmp_path / "x", "cpu")
    batch = prompts("qwen3_vl", 3)
    tokens, logits = generate(runtime, batch, 3)
    expected_tokens, expected = generate(reduced, batch, 3)
    assert torch.equal(tokens, expected_tokens)
    assert_onnx_close(logits, expected)
    # And the planes matter: without them the model says something else, by far more than rounding.
    with torch.no_grad():
        for parameter in model.model.visual.deepstack_merger_list.parameters():
            parameter.zero_()
    _, without = generate(reduced, batch, 3)
    assert (expected - without).abs().max() > 1e-2 * expected.abs().max()
