"""Bad input: the message says what was given and what to do."""

import pytest
import torch
from families import IMAGE, prompts, shared
from tiny import inputs, shared_llava
from transformers import DynamicCache

import deos_fx
from deos_fx import Budget, Policy, ReducedModel
from deos_fx.models.upstream import CACHE


@pytest.fixture(scope="module")
def reduced():
    return deos_fx.transform(shared_llava(2))


def text_prompt():
    return {"input_ids": torch.arange(1, 9)[None]}


# *** the inputs ***


@pytest.mark.parametrize("method", ["cost", "explain", "capture"])
def test_prompt_without_an_image(reduced, method):
    with pytest.raises(ValueError, match="no image, .*pixel_values"):
        getattr(reduced, method)(**text_prompt())


@pytest.mark.parametrize("method", ["__call__", "generate", "cost"])
def test_placeholders_without_an_image(reduced, method):
    batch = inputs(reduced.model)
    del batch["pixel_values"]
    options = {"max_new_tokens": 2} if method == "generate" else {}
    with pytest.raises(ValueError, match="no image, .*pixel_values|no images: pass pixel_values"):
        getattr(reduced, method)(**batch, **options)


def test_example_without_an_image():
    with pytest.raises(ValueError, match="no image"):
        deos_fx.transform(shared_llava(2), example_inputs=text_prompt())
    with pytest.raises(ValueError, match="no image"):
        deos_fx.transform(shared_llava(2), budget=Budget(flops=0.5), example_inputs=text_prompt())


def test_prompts_with_different_numbers_of_images(reduced):
    batch = inputs(reduced.model, batch=2)
    batch["input_ids"][1].clamp_(max=99)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"have \[0, 64\] visual tokens.*Only calling"):
        reduced.cost(**batch)
    with pytest.raises(ValueError, match="labels with prompts that have equally many images"):
        reduced(**batch, labels=batch["input_ids"])


def test_fewer_images_than_placeholders(reduced):
    batch = inputs(reduced.model, batch=2)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ValueError, match="Prompt 1 .* 64 image placeholders .* not those of"):
        reduced(**batch)


def test_more_images_than_placeholders(reduced):
    batch = inputs(reduced.model)
    batch["pixel_values"] = batch["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"pixel_values has 2 images, .* id 120\) for 1\."):
        reduced(**batch)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl", "minicpmv4_7"])
def test_one_placeholder_less(name):
    """Images of one size, tiles, and tables of sizes of patches, as tensors or side by side."""
    batch, model = prompts(name), shared(name)
    ids = batch["input_ids"]
    last = (ids == IMAGE).nonzero()[-1]
    ids[tuple(last)] = 5
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"][tuple(last)] = 0
    with pytest.raises(ValueError, match="tokens"):
        model(**batch)
    with pytest.raises(ValueError, match="placeholders.* same call of the model's processor"):
        ReducedModel(model, Policy())(**batch)


@pytest.mark.parametrize("name", ["output_router_logits", "output_attentions"])
def test_what_layers_compute_inside(name):
    model = ReducedModel(shared("qwen3_vl_moe"), Policy())
    batch = prompts("qwen3_vl_moe")
    with pytest.raises(ValueError, match=f"{name} is not supported: .* Leave it out"):
        model(**batch, **{name: True})
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        model.generate(**batch, **{name: True}, max_new_tokens=1)
    assert model(**batch, **{name: False}).logits.isfinite().all()


def test_what_layers_compute_inside_by_a_config(monkeypatch):
    model = shared("qwen3_vl_moe")
    batch, expected = prompts("qwen3_vl_moe"), model(**prompts("qwen3_vl_moe")).logits
    monkeypatch.setattr(model.config.text_config, "output_router_logits", True)
    with pytest.raises(ValueError, match="pass output_router_logits=False, if the .* config asks"):
        ReducedModel(model, Policy())(**batch)
    output = ReducedModel(model, Policy())(**batch, output_router_logits=False)
    assert torch.equal(output.logits, expected)


def test_hidden_states_by_a_config(monkeypatch):
    model, batch = shared("qwen3_vl_moe"), prompts("qwen3_vl_moe")
    monkeypatch.setattr(model.config.text_config, "output_hidden_states", True)
    ours, theirs = ReducedModel(model, Policy())(**batch), model(**batch)
    assert len(ours.hidden_states) == len(theirs.hidden_states) > 1
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


def test_embeddings_instead_of_ids(reduced):
    with pytest.raises(ValueError, match="pass input_ids .*not inputs_embeds"):
        reduced(inputs_embeds=torch.zeros(1, 3, 64))


def test_foreign_cache(reduced):
    cache = DynamicCache(config=reduced.model.config.get_text_config())
    with pytest.raises(ValueError, match=f"{CACHE} is a DynamicCache.*Pass None"):
        reduced(**inputs(reduced.model), **{CACHE: cache})


def test_a_failed_call_does_no_harm(reduced):
    batch = inputs(reduced.model)
    expected = reduced(**batch).logits
    with pytest.raises(ValueError, match="no image"):
        reduced.explain(**text_prompt())
    with pytest.raises(ValueError, match=r"128\*128"):
        reduced(**{**batch, "pixel_values": torch.zeros(1, 3, 128, 128)})
    assert torch.equal(reduced(**batch).logits, expected)
