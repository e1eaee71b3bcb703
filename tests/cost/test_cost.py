"""Predicted costs against torch's own FLOP counter and the bytes of a real cache."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, IMAGE, STATEFUL, TWINS, prompts, shared
from tiny import VISUAL, inputs, shared_llava, tiny_llava
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from deos_fx import presets
from deos_fx.cost.amounts import CostReport
from deos_fx.cost.measure import measure_decoder
from deos_fx.cost.model import CostModel
from deos_fx.cost.overhead import SiteSizes, operator_flops, relaxed_flops
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.search.space import relaxed_costs
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import site_order
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.tokens.layout import PromptLayout

POLICIES = {
    "empty": (),
    "prune": (Reduction("decoder.1", 20),),
    "prune at the projector": (Reduction("projector", 20, scores={"feature_norm": 1}),),
    "class attention": (Reduction("projector", 0.5, scores={"cls_attention": 1}),),
    "text attention": (
        Reduction("decoder.0", 16, scores={"text_attention": 1, "last_text_attention": 1}),
    ),
    "novelty": (Reduction("decoder.2", 16, scores={"novelty": 1, "key_norm": 1}),),
    "merge": (Reduction("decoder.1", 16, gain=1.0, mass_bias=1.0),),
    "merge at the projector": (Reduction("projector", 16, gain=1.0),),
    "pool": (Reduction("projector", 16, selector="grid", gain=1.0, similarity={"grid": 1}),),
    "redistribute": (
        Reduction("decoder.0", 30, gain=0.5, temperature=0.2, similarity={"feature": 1, "key": 1}),
    ),
    "uniform": (Reduction("decoder.3", 8, gain=1.0, temperature=math.inf),),
    "residual": (Reduction("projector", 8, residual=True),),
    "greedy": (Reduction("decoder.1", 8, selector="greedy", diversity=0.5, gain=1.0),),
    "tower": (
        Reduction("vision.0", 40, scores={"key_norm": 1, "cls_attention": 1}, gain=1.0),
        Reduction("vision.1", 24, scores={"cls_attention": 1}, residual=True),
        Reduction("projector", 16, scores={"cls_attention": 1, "novelty": 1}, gain=1.0),
    ),
    "before the last block": (
        Reduction("vision.0", 30, gain=1.0, similarity={"key": 1.0}, mass_bias=1.0),
        Reduction("projector", 16),
        Reduction("decoder.2", 4),
    ),
    "mutual": (
        Reduction("vision.0", 30, scores={"mutual_attention": 1}),
        Reduction("decoder.1", 10, scores={"mutual_attention": 1, "agreed_attention": 1}),
    ),
    "raters of the next layer": (
        Reduction("projector", 40),
        Reduction("decoder.1", 20, scores={"rater_attention": 1}, observe="next"),
        Reduction("decoder.3", 9, scores={"calibrated_rater_attention": 1}),
    ),
    "several sites": (
        Reduction("projector", 48, gain=1.0, mass_bias=1.0),
        Reduction("decoder.0", 32),
        Reduction("decoder.2", 16, gain=1.0, position="compact"),
        Reduction("decoder.4", 4, scores={"text_attention": 1}),
    ),
}


PUBLISHED = {
    "in the tower": (
        presets.tome(12, 1, VISUAL),
        presets.visionzip(20, 8, 1),
        presets.divprune(14),
        presets.sparsevlm_plus((1, 3), (10, 6)),
    ),
    "of the next block": (
        presets.evit(0.7, (0,), VISUAL),
        presets.prumerge(24, 1),
        presets.cdpruner(12),
        presets.pyramid_drop((1, 3), (0.1, 0.05)),
    ),
    "pooled": (
        presets.vispruner(32, 0.5, 1),
        presets.fitprune((40, 10, 2, 0, 0, 0), VISUAL),
    ),
    "probed": (presets.bilinear_pool(keep=16), presets.dart(2, 12)),
}


def joined(parts):
    """One policy of several; before the decoder all have one rule for positions."""
    steps = [step for policy in parts for step in policy.reductions]
    return Policy(tuple(sorted(steps, key=lambda step: site_order(step.site))))


def counted(reduced, **batch):
    """FLOPs of a prefill by torch's counter, and the cache it fills."""
    reduced(**batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = reduced(**batch)
    return counter.get_total_flops(), output[CACHE]


def shape_of(batch):
    """Text tokens per prompt and the batch size."""
    ids = batch["input_ids"]
    images = len(batch["pixel_values"]) // len(ids)
    return images, ids.shape[1] - images * VISUAL, len(ids)


def check(model, policy, batch, **arguments):
    """That a prediction equals what a run does, to the last operation and byte."""
    cost = CostModel.of_images(model, *shape_of(batch), **arguments).predict(policy)
    flops, cache = counted(ReducedModel(model, policy), **batch, **arguments)
    held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert cost.flops == flops
    assert cost.kv_bytes == sum(states.nbytes for states in held)


# The counter does not know the fused attention kernels of the CPU: eager attention counts in full.


@pytest.mark.parametrize("name", POLICIES)
def test_policy(name):
    model = shared_llava(attn="eager")
    check(model, Policy(POLICIES[name]), inputs(model, batch=2, images=2, layout="between"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods(name):
    model = shared_llava(attn="eager")
    batch = inputs(model, batch=2, images=2, layout="between")
    check(model, joined(PUBLISHED[name]), batch)


@pytest.mark.parametrize("logits_to_keep", [1, 3])
def test_some_logits(logits_to_keep):
    model = shared_llava(attn="eager")
    policy = Policy(POLICIES["several sites"])
    check(model, policy, inputs(model), logits_to_keep=logits_to_keep)


def test_half_precision():
    model = tiny_llava(3, attn="eager").bfloat16()
    check(model, Policy(POLICIES["merge"]), inputs(model))


ANYWHERE = Policy(
    (
        Reduction("projector", 0.5, scores={"feature_norm": 1}, gain=1.0, mass_bias=1.0),
        Reduction("decoder.1", 0.4, scores={"text_attention": 1}, similarity={"key": 1}, gain=1.0),
        Reduction("decoder.2", 0.25, scores={"mutual_attention": 1}, observe="next"),
    )
)


# One of each kind of encoder, mask, cache and experts. torch's counter knows neither grouped
# experts nor the fused attention kernels of the CPU.
COUNTED = (
    "vipllava",
    "llava_next",
    "internvl",
    "aya_vision",
    "got_ocr2",
    "smolvlm",
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl_moe",
    "gemma4",
    "llava_mixtral",
    "lfm2_vl",
    "qwen3_5",
    "nemotron_h_omni",
    "instructblip",
    "llama4",
    "phi4_multimodal",
    "kosmos-2",
    "kosmos-2.5",
    # Its projector has a table of numbers of patches.
    "aria",
    # Its encoder lists sizes of its own on the device of the weights.
    "step3p7",
)


@pytest.fixture
def eager(request):
    """A family's model while its attention and its experts count in full."""
    name = request.param
    model = shared(*name) if isinstance(name, tuple) else shared(name)
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    attention = {name: part._attn_implementation for name, part in parts.items() if part}
    attention |= {"": model.config._attn_implementation}
    experts = model.config._experts_implementation
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    yield request.param, model
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)


@pytest.mark.parametrize("eager", sorted({*COUNTED} & {*FAMILIES, *TWINS}), indirect=True)
def test_families(eager):
    name, model = eager
    policy = ANYWHERE
    if name in STATEFUL:
        # At the other sites, layers do not attend.
        policy = Policy((ANYWHERE.reductions[0], replace(ANYWHERE.reductions[1], site="decoder.2")))
    if facts_of(model).counts_positions:
        policy = Policy(tuple(replace(step, position="compact") for step in policy.reductions))
    assert_as_counted(ReducedModel(model, policy), prompts(name, 2))


def assert_as_counted(reduced, batch):
    """Fail unless the cost of a prefill is what torch counts and the cache holds."""
    cost = reduced.cost(**batch).after
    flops, cache = counted(reduced, **batch)
    assert cost.flops == flops
    held = [tree_leaves(vars(layer)) for layer in cache.layers]
    states = [x for parts in held for x in parts if isinstance(x, torch.Tensor)]
    assert cost.kv_bytes == sum(x.nbytes for x in states if x.is_floating_point())


# It has pools of keys, latent vectors in its cache, and streams; the next layer is peeked into.
@pytest.mark.parametrize("eager", [("glm5_next_shared", 3)], indirect=True)
def test_an_index_of_keys(eager):
    (name, _), model = eager
    first, second, _ = (replace(step, mass_bias=0.0) for step in ANYWHERE.reductions)
    policy = Policy((first, replace(second, observe="next")))
    assert_as_counted(ReducedModel(model, policy), prompts(name))


@pytest.mark.parametrize("eager", ["qwen4_exp"], indirect=True)
def test_streams_that_are_mixed_at_the_end(eager):
    # By then, there are fewer tokens than before the first layer. They are pools of two.
    name, model = eager
    policy = Policy((Reduction("decoder.1", 14, scores={"feature_norm": 1}),))
    assert_as_counted(ReducedModel(model, policy), prompts(name))


@pytest.mark.parametrize("eager", ["lfm2_vl", "qwen3_5", "llava_falcon_h1"], indirect=True)
def test_prompts_of_all_lengths(eager):
    _, model = eager
    cost, decoder = measure_decoder(facts_of(model)), model.get_decoder()
    # A convolution is over 3 or 4 tokens, and a chunk has 64.
    for length in (5, 64, 65, 200):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(inputs_embeds=torch.zeros(1, length, 64), use_cache=True)
        layers = sum(layer.growth.flops(length) for layer in cost.layers)
        assert counter.get_total_flops() == layers + (cost.before + cost.after) * length


@pytest.mark.parametrize("eager", ["gemma4", "lfm2_vl"], indirect=True)
@pytest.mark.parametrize("text", [0, 300])
def test_embeddings_for_every_layer_and_short_convolutions(eager, text):
    name, model = eager
    batch = prompts(name)
    ids = torch.nn.functional.pad(batch["input_ids"], (0, text), value=5)
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    policy = Policy((Reduction("decoder.1", 0.4, scores={"feature_norm": 1}),))
    cost = ReducedModel(model, policy).cost(**batch)
    assert cost.after.flops == counted(ReducedModel(model, policy), **batch)[0]
    assert cost.before.flops == counted(ReducedModel(model, Policy()), **batch)[0]


@pytest.mark.parametrize("eager", ["qwen2_5_vl"], indirect=True)
def test_images_of_several_sizes_in_a_prompt(eager):
    name, model = eager
    one = prompts(name)
    ids = one["input_ids"]
    # 8 x 16 patches and 8 x 8, merged by twos: 32 and 16 visual tokens.
    ids = torch.cat([ids[:, :37], ids[:, 3:20], ids[:, 36:]], dim=1)
    both = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, 8, 16], [1, 8, 8]]),
        "pixel_values": torch.cat([one["pixel_values"], one["pixel_values"][:64]]),
    }
    reduced = ReducedModel(model, Policy(ANYWHERE.reductions[:2]))
    cost = reduced.cost(**both).after
    assert cost.visual_tokens_per_layer == (24, 24, 19, 19, 19)
    assert cost.flops == counted(reduced, **both)[0]


def test_experts_count_as_many_as_are_active():
    text = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
    }
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text))
    decoder = measure_decoder(facts_of(model))
    layer, _ = decoder.layers
    attention = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64
    assert layer.growth.linear == 2 * (attention + 64 * 8 + 2 * 3 * 64 * 48)
    assert layer.growth.quadratic == 4 * 4 * 16
    assert decoder.before == decoder.after == 0


def test_tokens_per_layer():
    cost = CostModel.of_images(shared_llava(), images=1, text_tokens=10)
    several = cost.predict(Policy(POLICIES["several sites"]))
    assert several.visual_tokens_per_layer == (48, 32, 32, 16, 16, 4)
    assert several.visual_tokens == sum(several.visual_tokens_per_layer) / 6
    two = CostModel.of_images(shared_llava(), images=2, text_tokens=10).predict(Policy())
    assert two.visual_tokens_per_layer == (2 * VISUAL,) * 6


def test_differentiable():
    cost = CostModel.of_images(shared_llava(), images=1, text_tokens=10, batch=2)
    policy = Policy(POLICIES["prune"])
    exact = cost.predict(policy)
    counts = torch.tensor(cost.counts(policy), dtype=torch.float64, requires_grad=True)
    assert cost.flops(counts, cost.overhead(policy)).item() == exact.flops
    assert cost.kv_bytes(counts).item() == exact.kv_bytes
    assert cost.mean_tokens(counts).item() == exact.visual_tokens
    (slope,) = torch.autograd.grad(cost.flops(counts), counts)
    one_more = cost.predict(Policy((Reduction("decoder.1", 21),)))
    rise = one_more.flops - exact.flops
    assert slope[2:].sum().item() == pytest.approx(rise, rel=0.01)


@pytest.mark.parametrize("name", POLICIES)
def test_a_search_sees_the_operations_of_the_policy(name):
    sizes = SiteSizes(width=48, key=12, joint_key=24, text=9)
    grid = PromptLayout(0, 1, (8, 8)).grid_tensor(1)
    for step in POLICIES[name]:
        after = step.count(VISUAL)
        exact = operator_flops(step, VISUAL, after, sizes, grid)
        assert relaxed_flops(step, VISUAL, torch.tensor(float(after)), sizes) == exact


@pytest.mark.parametrize("stage", ["vision", "projector", "decoder"])
def test_relaxed_costs_are_those_of_the_policy(stage):
    site = "projector" if stage == "projector" else f"{stage}.0"
    cost = CostModel.of_images(shared_llava(), images=2, text_tokens=10)
    policy = Policy((Reduction(site, 16, scores={"feature_norm": 1}, gain=1.0),))
    relaxed = {site: RelaxedReduction.from_reduction(policy.reductions[0], 16 / VISUAL)}
    predicted = relaxed_costs(relaxed, cost)
    exact = cost.predict(policy)
    assert predicted["flops"].item() == pytest.approx(exact.flops, rel=1e-4)
    assert predicted["visual_tokens"].item() == pytest.approx(exact.visual_tokens)


def test_report_is_readable():
    cost = CostModel.of_images(shared_llava(), images=1, text_tokens=10)
    after = cost.predict(Policy((Reduction("projector", 16),)))
    text = str(CostReport(cost.predict(Policy()), after))
    assert "25.0%" in text
    assert "16 16 16 16 16 16" in text


def test_the_cost_of_text_alone():
    # Torch's counter does not know the kernel that runs causal attention without a mask.
    model = shared_llava(attn="eager")
    batch = inputs(model, batch=2, padding=None)
    ids = batch["input_ids"]
    text = ids[ids != IMAGE].view(len(ids), -1)
    flops, cache = counted(ReducedModel(model, Policy()), input_ids=text)
    cost = CostModel.of_images(model, 1, text.shape[1], batch=2).without_images()
    assert cost.flops == flops
    assert cost.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert set(cost.visual_tokens_per_layer) == {0} and cost.visual_tokens == 0


@pytest.mark.parametrize(
    "eager",
    ["qwen2_vl", "qwen3_vl", "internvl", "idefics3", "gemma3", "ovis2", "llava_next"]
    + ["minicpmv4_6"],
    indirect=True,
)
@pytest.mark.parametrize("attention", [False, True])
def test_groups_of_patches_in_the_tower(eager, attention):
    name, model = eager
    merge = {"gain": 1.0, "similarity": {"key": 1}, "scores": {"mutual_attention": 1}}
    how = merge if attention else {"scores": {"feature_norm": 1}}
    # Patches are merged after the first block of MiniCPM-V.
    step = Reduction(f"vision.{int(name == 'minicpmv4_6')}", 0.25, **how)
    reduced, batch = ReducedModel(model, Policy((step,))), prompts(name, 2)
    cost = reduced.cost(**batch)
    # Tiles of an image lose unequally many patches, and count as if they lost equally many.
    rounded = {"rel": 0.002 if name == "llava_next" else 0, "abs": 0}
    assert cost.after.flops == pytest.approx(counted(reduced, **batch)[0], **rounded)
    assert cost.before.flops == counted(ReducedModel(model, Policy()), **batch)[0]
