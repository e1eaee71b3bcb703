"""Models without weights, as large as one likes; and that no weight is ever copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import FAMILIES, prompts, shared
from tiny import call_of, inputs, shared_llava
from torch import fx

from benchmarks.common import SHAPES
from deos_fx import Policy, Reduction, presets, transform
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.models.facts import facts_of
from deos_fx.models.groups import find_groups
from deos_fx.models.shapes_only import ShapesOnly
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.pipeline import Captured, capture_call, lower_call

MERGE = Policy(
    tuple(
        Reduction(site, keep, gain=1.0, mass_bias=1.0)
        for site, keep in (("projector", 0.5), ("decoder.2", 0.25), ("decoder.16", 0.1))
    )
)


def captured(model: Any, batch: dict[str, Any]) -> tuple[Captured, Any]:
    call = call_of(model, batch)
    return capture_call(model, call.inputs), call.layout


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llava_7b() -> Any:
    return on_meta(SHAPES["llava-1.5-7b"]())


def prompt_of_7b() -> dict[str, Any]:
    ids = torch.full((1, 592), 5)
    ids[:, 1:577] = 32000
    return {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 336, 336)}


def no_values(graph_module: fx.GraphModule) -> bool:
    return all(weight.is_meta for weight in graph_module.parameters())


def test_numbers_that_code_lists_have_values() -> None:
    with ShapesOnly():
        assert torch.tensor([[1, 4, 8]], device="meta").tolist() == [[1, 4, 8]]
        assert torch.tensor([0.5], device="meta").is_meta


def test_masks_without_values_select_everything() -> None:
    with ShapesOnly():
        states = torch.empty(2, 6, 3, device="meta")
        assert states[:, states[0, :, 0] > 0].shape == states.shape
        assert states[states[..., 0] > 0].shape == (12, 3)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_attention_has_its_shape_and_its_gradients(heads: int, needs_grad: bool) -> None:
    """Windows attend one by one: where no gradient is asked for, attention is one operation."""
    shapes = ((3, 4, 7, 8), (3, heads, 9, 8), (3, heads, 9, 5))
    states = [torch.randn(shape, requires_grad=needs_grad) for shape in shapes]
    plain = F.scaled_dot_product_attention(*states, enable_gqa=True)
    with ShapesOnly():
        empty = [state.detach().to("meta").requires_grad_(needs_grad) for state in states]
        found = F.scaled_dot_product_attention(*empty, enable_gqa=True)
        assert found.is_meta and found.shape == plain.shape and found.dtype == plain.dtype
        assert found.requires_grad == needs_grad
        if needs_grad:
            gradients = torch.autograd.grad(found.sum(), empty)
            assert [gradient.shape for gradient in gradients] == [state.shape for state in states]
        # What has values is computed.
        values = [state.detach() for state in states]
        assert torch.equal(F.scaled_dot_product_attention(*values, enable_gqa=True), plain)


@pytest.mark.parametrize(
    "name", ["internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "pixtral", "llava_next"]
)
def test_without_weights_the_graph_is_the_same(name: str) -> None:
    batch = prompts(name, 2)
    steps = (Reduction("projector", 0.5, scores={"feature_norm": 1.0}), Reduction("decoder.1", 0.5))
    codes, sites = [], []
    for model in (shared(name), on_meta(FAMILIES[name].config())):
        found, layout = captured(model, batch)
        sites.append(found.sites)
        lowered = lower_call(found, Policy(steps), layout)
        codes.append(lowered.code.replace("type='meta'", "type='cpu'"))
    assert codes[0] == codes[1]
    assert sites[0] == sites[1]


@pytest.mark.parametrize("name", ["granite4_vision", "llava_next", "mistral3", "qwen2_5_vl"])
def test_without_weights_the_groups_of_patches_are_the_same(name: str) -> None:
    found = []
    for model in (shared(name), on_meta(shared(name).config)):
        facts = facts_of(model)
        call = call_of(model, prompts(name))
        ((method, given),) = call.first_prompt().encodings
        blocks = [model.get_submodule(path) for path in facts.blocks.vision]
        core = model.base_model
        found.append(find_groups(core, getattr(type(core), method), blocks, (), given))
    real, made_up = found
    assert torch.equal(made_up.groups, real.groups)
    assert (made_up.shape, made_up.used, made_up.first) == (real.shape, real.used, real.first)


def test_32_layers_of_a_7b_shape(llava_7b: Any) -> None:
    found, layout = captured(llava_7b, prompt_of_7b())
    assert len(found.graph_module.graph.nodes) < 150
    available = {site.name for site in found.sites.available()}
    expected = {f"decoder.{i}" for i in range(31)} | {f"vision.{i}" for i in range(23)}
    assert available == expected | {"projector"}
    lowered = lower_call(found.copy(), MERGE, layout)
    assert len(lowered.graph.nodes) < 250
    half = {"activation": 0.5, "retention": 0.5}
    reductions = {step.site: RelaxedReduction(step, **half) for step in MERGE.reductions}
    relaxed = insert_relaxed(found.copy().graph_module, found.sites, reductions, layout)
    for graph_module in (found.graph_module, lowered):
        assert no_values(graph_module)
    kept = {id(weight) for weight in relaxed.parameters() if weight.is_meta}
    assert kept <= {id(weight) for weight in llava_7b.parameters()}


def test_transform_takes_a_model_without_weights(llava_7b: Any) -> None:
    policy = presets.fastv(layer=2, keep=0.25)
    reduced = transform(llava_7b, policy=policy, example_inputs=prompt_of_7b())
    assert no_values(reduced.graph_module)


def test_no_weight_is_copied() -> None:
    model = shared_llava()
    reduced = transform(model, policy=presets.fastv(layer=2, keep=0.25))
    reduced.capture(**inputs(model))
    lowered = reduced.graph_module
    mine = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in lowered.parameters()} <= mine
    # Blocks that nothing looks into are the model's own modules.
    own = {id(module) for module in model.modules()}
    blocks = [m for name, m in lowered.named_children() if name.startswith("decoder_")]
    assert sum(id(block) in own for block in blocks) == len(blocks) - 1
