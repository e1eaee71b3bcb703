"""Inputs as users and processors write them: other types and former names mean the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import prompts, shared
from in_pytorch import without_tracing
from masked import generate
from test_families import PRUNED
from tiny import call_of, inputs, shared_llava
from torch import Tensor

from deos_fx import transform
from deos_fx.cli.outline import outline
from deos_fx.cost.model import CostModel
from deos_fx.exporters.onnx import export_onnx
from deos_fx.exporters.onnx_model import OnnxModel
from deos_fx.inputs.call import normal_inputs
from deos_fx.models.upstream import CACHE, FORMER_CACHE
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

Form = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _as(dtype: torch.dtype, *names: str) -> Form:
    return lambda batch: batch | {name: batch[name].to(dtype) for name in names}


FORMS: dict[str, Form] = {
    "mask of floats": _as(torch.float32, "attention_mask"),
    "mask of halves": _as(torch.bfloat16, "attention_mask"),
    "mask of flags": _as(torch.bool, "attention_mask"),
    "mask of small numbers": _as(torch.uint8, "attention_mask"),
    "ids of 32 bits": _as(torch.int32, "input_ids", "attention_mask"),
}
POLICY = Policy(PRUNED["both"])
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_other_types_mean_the_same(name: str, form: str) -> None:
    reduced, batch = ReducedModel(shared(name), POLICY), prompts(name, 2)
    given = FORMS[form](batch)
    assert torch.equal(reduced(**given).logits, reduced(**batch).logits)
    for ours, expected in zip(generate(reduced, given), generate(reduced, batch), strict=True):
        assert torch.equal(ours, expected)
    empty = ReducedModel(shared(name), Policy())
    assert torch.equal(empty(**given).logits, shared(name)(**batch).logits)
    for got, right in zip(reduced.explain(**given), reduced.explain(**batch), strict=True):
        assert torch.equal(got.kept, right.kept)
    assert reduced.cost(**given) == reduced.cost(**batch)


@every_form
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_that_differ_are_split(form: str, padding: str) -> None:
    model = shared_llava()
    batch = inputs(model, 3, padding=padding)
    # The last prompt is one of text alone.
    batch["input_ids"][2].clamp_(max=100)
    batch["pixel_values"] = batch["pixel_values"][:2]
    reduced, given = ReducedModel(model, POLICY), FORMS[form](batch)
    assert torch.equal(reduced(**given).logits, reduced(**batch).logits)


def test_positions_of_32_bits() -> None:
    batch = prompts("llava", 2)
    places = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    reduced = ReducedModel(shared("llava"), POLICY)
    expected = reduced(**batch, position_ids=places).logits
    assert torch.equal(reduced(**batch, position_ids=places.int()).logits, expected)


@pytest.mark.parametrize("form", ["mask of floats", "ids of 32 bits"])
def test_decoding_goes_on(form: str) -> None:
    reduced, batch = ReducedModel(shared("llava"), POLICY), prompts("llava", 2)
    logits = []
    for given in (batch, FORMS[form](batch)):
        cache = reduced(**given)[CACHE]
        ids, mask = given["input_ids"], given["attention_mask"]
        ids, mask = ids[:, -1:], torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        step = reduced(input_ids=ids, attention_mask=mask, **{CACHE: cache})
        logits.append(step.logits)
    assert torch.equal(*logits)


def test_a_search_takes_other_types() -> None:
    batch, budget = inputs(shared_llava(2), 2), Budget(visual_tokens=0.25)
    policy = Policy((Reduction("projector", 16),))
    losses = {
        SearchProblem.of(shared_llava(2), [form(batch)], budget).static_loss(policy)
        for form in (dict, *FORMS.values())
    }
    assert len(losses) == 1


# *** names that processors once gave ***


def test_former_names_are_taken_at_every_door() -> None:
    model, former = shared("video_llava"), prompts("video_llava", 2)
    assert "pixel_values_images" in former
    today = {name.removesuffix("_images"): value for name, value in former.items()}
    reduced = transform(model, policy=POLICY, example_inputs=former)
    assert torch.equal(reduced(**former).logits, reduced(**today).logits)
    for ours, expected in zip(generate(reduced, former), generate(reduced, today), strict=True):
        assert torch.equal(ours, expected)
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(reduced.generate(**former, **beams), reduced.generate(**today, **beams))
    assert reduced.cost(**former) == reduced.cost(**today)
    assert torch.equal(reduced.explain(**former)[0].kept, reduced.explain(**today)[0].kept)
    calls = [call_of(model, given) for given in (former, today)]
    costs = [CostModel.of_call(call).predict(POLICY) for call in calls]
    assert costs[0] == costs[1]
    budget = Budget(visual_tokens=0.5, flops=0.9)
    made, losses = (
        [make(given) for given in (former, today)]
        for make in (
            lambda given: transform(model, budget=budget, example_inputs=given).policy,
            lambda given: SearchProblem.of(model, [given], budget).static_loss(POLICY),
        )
    )
    assert made[0] == made[1] and losses[0] == losses[1]
    assert outline(model, former) == outline(model, today)


def test_the_former_name_of_the_cache_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    # What happens with transformers 5.24, whichever is installed.
    monkeypatch.setattr("deos_fx.inputs.call.CACHE", "cache")
    with pytest.warns(FutureWarning, match=f"{FORMER_CACHE} is deprecated, use cache"):
        assert normal_inputs({FORMER_CACHE: 1}) == {"cache": 1}
    with pytest.warns(FutureWarning):
        assert normal_inputs({FORMER_CACHE: 1, "cache": 2}) == {"cache": 2}


def test_an_export_takes_all_of_these(tmp_path: Path) -> None:
    model, former = shared("video_llava", 2), prompts("video_llava", 2)
    today = {name.removesuffix("_images"): value for name, value in former.items()}
    reduced = ReducedModel(model, Policy((Reduction("projector", 16, scores={"novelty": 1.0}),)))
    example = FORMS["mask of floats"](former)
    with without_tracing():
        export_onnx(reduced, tmp_path / "onnx", example_inputs=example)
        exported = OnnxModel.from_pretrained(tmp_path / "onnx", "cpu")
    tokens, logits = generate(exported, today)
    assert torch.equal(tokens, generate(reduced, today)[0])
    doubles = _as(torch.float64, "pixel_values_images")
    for form in (dict, doubles, *FORMS.values()):
        assert torch.equal(exported(**form(former)).logits, exported(**today).logits)
        ours = generate(exported, form(former))
        assert torch.equal(ours[0], tokens) and torch.equal(ours[1], logits)


def test_hooks_are_told_of_no_call_that_only_finds_positions() -> None:
    model, told = shared("qwen2_vl"), list[object]()
    decoder = model.get_decoder()
    handles = [
        handle
        for part in (decoder, decoder.layers[0])
        for handle in (
            part.register_forward_pre_hook(lambda part, args: told.append(part)),
            part.register_forward_hook(lambda part, *_: told.append(part), always_call=True),
        )
    ]
    try:
        assert "position_ids" in call_of(model, prompts("qwen2_vl")).inputs
    finally:
        for handle in handles:
            handle.remove()
    assert not told


def test_ends_of_rows_are_text_in_an_outline():
    """They are placeholders in a prompt, but are never reduced: costs count them as text."""
    model, given = shared("llava_next"), prompts("llava_next")
    text = given["input_ids"].shape[1] - 88
    policy = Policy((Reduction("projector", 0.25, scores={"feature_norm": 1.0}),))
    plain, reduced = outline(model, given), outline(model, given, policy)
    assert (plain.visual, plain.ends, plain.text) == (16 + 8 * 8, 8, text + 8)
    for found, visual in (plain, 80), (reduced, 20):
        last = found.rows[-1]
        assert (last.visual, last.tokens) == (visual, visual + 8 + text)
