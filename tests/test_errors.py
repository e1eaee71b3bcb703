"""Bad input: the message says what was given and what to do, and nothing is left half-written."""

import tempfile
from dataclasses import replace

import pytest
import torch
from families import prompts, shared
from tiny import inputs, shared_llava, tiny_llava
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

import deos_fx
from deos_fx import Budget, Policy, ReducedModel, Reduction, presets
from deos_fx.models.upstream import CACHE

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def reduced():
    return deos_fx.transform(shared_llava(2))


def text_prompt():
    return {"input_ids": torch.arange(1, 9)[None]}


# *** the model ***


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(vocab_size=50, **SMALL)),
        BertModel(BertConfig(vocab_size=50, **SMALL)),
        CLIPModel(
            CLIPConfig(
                text_config=SMALL | {"vocab_size": 50},
                vision_config=SMALL | {"image_size": 16, "patch_size": 8},
            )
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_model_that_answers_no_images(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} .*LlavaForConditionalGeneration"):
        deos_fx.transform(model)


@pytest.mark.parametrize("model", ["llava-1.5-7b", None, torch.nn.Linear(2, 2)])
def test_something_that_is_no_model(model):
    message = f"model is a {type(model).__name__}; .*from_pretrained"
    with pytest.raises(TypeError, match=message):
        deos_fx.transform(model)
    with pytest.raises(TypeError, match=message):
        ReducedModel(model, Policy())


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


# *** the budget ***


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, float("nan")])
def test_budget_out_of_range(limit):
    with pytest.raises(ValueError, match="budget visual_tokens="):
        Budget(visual_tokens=limit)


def test_budget_of_more_tokens_than_there_are():
    with pytest.raises(ValueError, match="visual_tokens=200, but the model has only 64; give"):
        deos_fx.transform(shared_llava(), budget=Budget(visual_tokens=200))


def test_budget_without_a_limit():
    with pytest.raises(ValueError, match="no limit; give at least one of visual_tokens, flops"):
        deos_fx.transform(shared_llava(), budget=Budget())


@pytest.mark.parametrize("budget", [0.125, 64, "0.5"])
def test_budget_that_is_none(budget):
    with pytest.raises(TypeError, match=r"budget is a .*Budget\(visual_tokens="):
        deos_fx.transform(shared_llava(), budget=budget)


def test_budget_that_cannot_be_met():
    model = shared_llava()
    with pytest.raises(ValueError, match=r"cannot be met: flops=10 \(.*Raise the budget"):
        deos_fx.transform(model, budget=Budget(flops=10), example_inputs=inputs(model))


@pytest.mark.parametrize("budget", [Budget(flops=0.5), Budget(kv_cache=0.5)])
def test_budget_that_needs_a_prompt(budget):
    with pytest.raises(ValueError, match="depend on its length: give example_inputs"):
        deos_fx.transform(shared_llava(), budget=budget)


def test_latency_without_data():
    with pytest.raises(ValueError, match="latency is measured by the search. Give data"):
        deos_fx.transform(shared_llava(), budget=Budget(latency_ms=5))


# *** the policy ***


@pytest.mark.parametrize("policy", ["policy.json", "fastv", presets.fastv])
def test_policy_that_is_none(policy):
    with pytest.raises(TypeError, match=r"policy is a .*Policy.load\(path\)"):
        deos_fx.transform(shared_llava(), policy=policy)


@pytest.mark.parametrize("others", [{"budget": Budget(visual_tokens=0.5)}, {"data": []}])
def test_policy_and_something_to_make_one_from(others):
    with pytest.raises(ValueError, match="a policy is applied as it is. Leave"):
        deos_fx.transform(shared_llava(), policy=Policy(), **others)


def test_policy_for_another_model():
    other = deos_fx.transform(shared_llava(2)).signature
    policy = Policy(name="searched", model=replace(other, visual_tokens=576))
    with pytest.raises(ValueError, match="searched was made for .*576.* and this model is .*64"):
        deos_fx.transform(shared_llava(2), policy=policy)


@pytest.mark.parametrize(
    "reduction, message",
    [
        (Reduction("decoder.9", 8), "decoder.9, but llava has 6 decoder layers"),
        (Reduction("decoder.1", 100), "keeps 100 visual tokens, .* only 64; keep at most 64"),
        (Reduction("decoder.5", 8), "nothing would be saved. Use another site"),
        (Reduction("vision.2", 8), "not used by the language model. Use another site"),
        (Reduction("decoder.1", 8, scores={"cls_attention": 1}), "decoder.1 has no score"),
        (Reduction("projector", 8, scores={"text_attention": 1}), "it has .*cls_attention"),
        (Reduction("projector", 59, selector="grid"), r"59 windows do not fit .* keep one of \["),
    ],
    ids=lambda value: value.site if isinstance(value, Reduction) else "",
)
def test_policy_that_does_not_fit(reduction, message):
    model = shared_llava()
    with pytest.raises(ValueError, match=message):
        deos_fx.transform(model, policy=Policy((reduction,)), example_inputs=inputs(model))


def test_corrupt_policy_file(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"deos_fx": "policy", "version": 1, "reduc')
    with pytest.raises(ValueError, match="policy.json is not a policy file: not JSON"):
        Policy.load(path)


# *** folders ***


def test_saving_below_a_file(tmp_path, reduced):
    file = tmp_path / "file"
    file.write_text("something")
    for target in (file, file / "below"):
        with pytest.raises(OSError, match="cannot write the folder .*file"):
            reduced.save_pretrained(target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "something"


def test_saving_to_an_unwritable_folder(tmp_path, reduced, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # A folder's mode does not stop root, who may be running this.
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PermissionError, match="cannot write the folder .*model: Permission denied"):
        reduced.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_interrupted_save_leaves_the_earlier_model(tmp_path, reduced, monkeypatch):
    reduced.save_pretrained(tmp_path / "model")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "model").iterdir()}

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(Policy, "save", fail)
    other = ReducedModel(tiny_llava(2, seed=1), Policy())
    for target in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path / target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "model").iterdir()} == before


def test_loading_what_is_no_reduced_model(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder. Give a folder that"):
        ReducedModel.from_pretrained(tmp_path / "missing")
    tiny_llava(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no deos_fx.json.* call deos_fx.transform"):
        ReducedModel.from_pretrained(tmp_path)


def test_loading_a_damaged_reduced_model(tmp_path, reduced):
    reduced.save_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(ValueError, match="policy.json is not a policy file"):
        ReducedModel.from_pretrained(tmp_path)
    for note, message in (
        ("{", "deos_fx.json is damaged"),
        ("[]", "deos_fx.json is damaged"),
        ('{"deos_fx": "reduced_model", "version": 9}', "version 9; this release reads"),
    ):
        (tmp_path / "deos_fx.json").write_text(note)
        with pytest.raises(ValueError, match=message):
            ReducedModel.from_pretrained(tmp_path)
