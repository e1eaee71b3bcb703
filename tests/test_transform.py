"""`transform`: which policy it applies, and when it captures."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from families import prompts, shared
from tiny import IMAGE, VISUAL, abacus, inputs, shared_llava
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import deos_fx
from deos_fx import Budget, Policy, Reduction, presets
from deos_fx.models.upstream import CACHE

# With and without a CLS token, separators, windows, grids of positions and DeepStack.
SEVERAL = ("vipllava", "llava_next", "pixtral", "internvl", "smolvlm", "gemma3", "qwen3_vl")


def kept(reduced):
    """Tokens kept per image by each reduction."""
    return reduced.policy.counts(VISUAL)


def test_nothing_but_a_model():
    model = shared_llava()
    reduced = deos_fx.transform(model)
    assert reduced.policy.name == "merge"
    assert [reduction.site for reduction in reduced.policy.reductions] == ["projector"]
    assert kept(reduced) == [VISUAL // 2]
    batch = inputs(model, batch=2)
    assert reduced(**batch).logits.shape[1] == batch["input_ids"].shape[1] - VISUAL // 2


@pytest.mark.parametrize("limit, count", [(0.125, 8), (20, 20), (1, 1), (1.0, VISUAL), (0.99, 63)])
def test_budget_of_visual_tokens(limit, count):
    assert kept(deos_fx.transform(shared_llava(), budget=Budget(visual_tokens=limit))) == [count]


@pytest.mark.parametrize(
    "budget",
    [
        Budget(flops=0.5),
        Budget(kv_cache=0.4),
        Budget(kv_cache=100_000),
        Budget(flops=0.7, kv_cache=0.7, visual_tokens=30),
    ],
)
def test_largest_count_within_every_limit(budget):
    model = shared_llava()
    batch = inputs(model, batch=2, images=2)
    reduced = deos_fx.transform(model, budget=budget, example_inputs=batch)
    report = reduced.cost(**batch)
    limits = budget.limits(report.before)
    assert all(report.after.amounts[name] <= limit for name, limit in limits.items())
    one_more = presets.merge(keep=kept(reduced)[0] + 1)
    amounts = deos_fx.ReducedModel(model, one_more).cost(**batch).after.amounts
    assert any(amounts[name] > limit for name, limit in limits.items())


def test_policy_is_applied_as_it_is():
    policy = Policy((Reduction("decoder.1", 9),))
    assert deos_fx.transform(shared_llava(), policy=policy).policy is policy
    assert deos_fx.transform(shared_llava(), policy=Policy()).policy.is_empty


def test_data_is_searched_for_the_budget(monkeypatch):
    found = Policy((Reduction("decoder.1", 9),))
    calls = []

    def search(model, data, *, budget):
        calls.append((model, data, budget))
        return SimpleNamespace(policy=found)

    monkeypatch.setattr("deos_fx.passes.search.search.search", search)
    model = shared_llava()
    data = [inputs(model)]
    assert deos_fx.transform(model, data=data).policy is found
    deos_fx.transform(model, data=data, budget=Budget(flops=0.3))
    assert calls == [
        (model, data, Budget(visual_tokens=0.5)),
        (model, data, Budget(flops=0.3)),
    ]


def test_capture_is_lazy_without_example_inputs():
    model = shared_llava(2)
    with pytest.raises(RuntimeError, match="example_inputs"):
        _ = deos_fx.transform(model).graph_module
    batch = inputs(model)
    code = deos_fx.transform(model, example_inputs=batch).graph_module.code
    assert "merge_projector" in code


def test_default_without_a_class_token():
    text = shared_llava(2).config.text_config
    vision = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=VISUAL,
    )
    reduced = deos_fx.transform(LlavaForConditionalGeneration(config))
    (site,) = reduced.explain(**inputs(reduced.model))
    assert site.kept.shape == (1, VISUAL // 2)


@pytest.mark.parametrize("name", SEVERAL)
def test_families(name):
    model, batch = shared(name), prompts(name, 2)
    report = deos_fx.transform(model, budget=Budget(visual_tokens=0.25)).cost(**batch)
    assert report.after.visual_tokens == report.before.visual_tokens / 4
    reduced = deos_fx.transform(model, budget=Budget(kv_cache=0.6), example_inputs=batch)
    (site,) = reduced.explain(**batch)
    before, after = reduced.cost(**batch).before, reduced.cost(**batch).after
    (space,) = reduced(**batch)[CACHE].spaces
    assert site.remaining.equal(space.origin)
    assert site.kept.shape == (2, after.visual_tokens_per_layer[0])
    assert 0.5 * before.kv_bytes < after.kv_bytes <= 0.6 * before.kv_bytes
    one_more = (site.kept.shape[1] + 1) / before.visual_tokens_per_layer[0]
    costs = deos_fx.ReducedModel(model, presets.uniform(keep=one_more)).cost(**batch)
    assert costs.after.kv_bytes > 0.6 * before.kv_bytes


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_what_an_image_has_depends_on_its_size(name):
    assert deos_fx.transform(shared(name)).policy.reductions[0].keep == 0.5
    for budget in (Budget(visual_tokens=8), Budget(kv_cache=0.5), Budget(flops=0.5)):
        with pytest.raises(ValueError, match="depends on its size.* give example_inputs"):
            deos_fx.transform(shared(name), budget=budget)
    batch = prompts(name)
    exact = deos_fx.transform(shared(name), budget=Budget(visual_tokens=7), example_inputs=batch)
    assert exact.explain(**batch)[0].kept.shape == (1, 7)
    assert isinstance(exact.policy.reductions[0].keep, float)


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


@pytest.mark.parametrize("limit", ["flops", "kv_cache", "latency_ms"])
def test_budget_that_needs_a_prompt(limit):
    table = {"latency_table": abacus(shared_llava())} if limit == "latency_ms" else {}
    budget = Budget(**{limit: 0.5}, **table)
    with pytest.raises(ValueError, match="depend on its length: give example_inputs"):
        deos_fx.transform(shared_llava(), budget=budget)


def test_latency_without_data():
    with pytest.raises(ValueError, match="latency is measured by the search. Give data"):
        deos_fx.transform(shared_llava(), budget=Budget(latency_ms=5))


def test_latency_by_a_table():
    model = shared_llava()
    given, layers = inputs(model), model.config.text_config.num_hidden_layers
    budget = Budget(latency_ms=25.0 * layers, latency_table=abacus(model))
    reduced = deos_fx.transform(model, budget=budget, example_inputs=given)
    words = given["input_ids"].shape[1] - VISUAL
    # One reduction at the projector: all layers have the same length. Its own FLOPs count too.
    assert 1 <= reduced.policy.reductions[0].keep <= 25 - words


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
        (
            Reduction("projector", 59, selector="windows", options={"windows": 59}),
            r"59 windows do not fit .* keep one of \[",
        ),
    ],
    ids=lambda value: value.site if isinstance(value, Reduction) else "",
)
def test_policy_that_does_not_fit(reduction, message):
    model = shared_llava()
    with pytest.raises(ValueError, match=message):
        deos_fx.transform(model, policy=Policy((reduction,)), example_inputs=inputs(model))
