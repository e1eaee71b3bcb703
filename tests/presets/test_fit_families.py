"""Every preset on every family: it is fitted and can be lowered, or one line says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, REFUSED, TWINS, prompts, shared
from tiny import call_of

from deos_fx import presets, transform
from deos_fx.cost.model import CostModel
from deos_fx.models.facts import facts_of
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.policy.policy import Policy

EVERY = {*presets.names()}
TOWER = {"evit", "fastervlm", "hiprune", "holov", "prumerge", "prumerge_plus", "tome"} | {
    "visionzip",
    "vispruner",
    "vscan",
}
# Rows and columns of the visual tokens are not known.
PLACES = {"avg_pool", "bilinear_pool", "uniform"}
# A visual token is a patch of the tower, so its attention can be observed.
PATCHWISE = {"llava", "vipllava", "paligemma", "llava_dinov2", "paligemma2", "llava_mixtral"} | {
    *("janus", "llava_gemma2", "video_llava", "deepseek_vl", "llava_mistral"),
    *("llava_falcon_h1", "llava_jamba", "ovis2", "git"),
}
# Groups of patches are tokens in the tower, and the config says how an image becomes inputs.
GROUPS = {"aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_omni", "exaone4_5"} | {
    *("gemma3", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "granite4_vision"),
    *("granite_vision", "hyperclovax_v2", "idefics3", "internvl", "lighton_ocr", "llava_next"),
    *("llava_next_video", "llava_onevision", "minimax_m3_vl", "mistral3", "pixtral"),
    *("qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "mistral_large4"),
    *("glm5_next", "glm5_next_shared", "dots3_note", "llama4", "qwen4_exp"),
}
# They read the attention of two blocks of the tower.
TWO_BLOCKS = {"hiprune", "vscan"}
UNPLACED = {"llava_next", "llava_onevision", "gemma4", "molmo2", "fuyu", "granite4_vision"} | {
    *("llava_next_video", "chameleon", "deepseek_vl_hybrid", "granite_vision", "gemma4_unified"),
    *("deepseek_ocr2", "inkling_mm_model", "blip-2", "instructblip", "phi4_multimodal"),
    *("kosmos-2", "kosmos-2.5", "hunyuan_vl", "step3p7", "hy_v4_vl", "emu3", "gemma3n"),
}
# The first layers of the decoder do not attend: more than half of the tokens reach one that does.
LATE = {"lfm2_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni"} | {
    *("qwen3_5", "qwen3_5_moe", "glm5_next", "qwen4_exp"),
}
ATTENTION = {"dart", "fastv", "fitprune", "sparsevlm_plus"}
# Presets that go without the attention of these families' decoder, or places of their tokens.
FURTHER = {"git": {"hiprune", "pyramid_drop", "vscan"} | ATTENTION | PLACES}

ALL_LOWERED = {"vipllava", "paligemma", "llava_dinov2", "qwen3_vl", "internvl"}


def expected_refusals(family: str) -> set[str]:
    refused = set() if family in PATCHWISE else TOWER & (TWO_BLOCKS if family in GROUPS else TOWER)
    refused |= PLACES if family in UNPLACED else set()
    return refused | (ATTENTION if family in LATE else set()) | FURTHER.get(family, set())


def fitted(family: str) -> tuple[dict[str, Policy], dict[str, str], Any]:
    """The presets at half of the tokens, the reasons of the others, and what they are for."""
    model = shared(family)
    call = call_of(model, prompts(family) | {"use_cache": False})
    costs = CostModel.of_call(call)
    size = call.layout.grid if facts_of(model).sizes_vary else None
    policies, reasons = {}, {}
    for name in sorted(EVERY):
        try:
            policy = presets.fit(name, costs.tokens_per_image / 2, model, size)
        except ValueError as error:
            reasons[name] = str(error)
        else:
            policies[name] = costs.for_any_size(policy)
            counts = costs.counts(policies[name])
            assert sum(counts) / len(counts) <= sum(call.layout.sizes) / 2
    return policies, reasons, call


@pytest.mark.parametrize("family", sorted({*FAMILIES, *TWINS} - REFUSED))
def test_presets_are_fitted_to_every_family_or_refused_in_one_line(family: str) -> None:
    policies, reasons, call = fitted(family)
    assert {*reasons} == expected_refusals(family)
    for name, reason in reasons.items():
        assert reason.startswith(f"{name} cannot ") and "\n" not in reason
        # The advice can be followed.
        assert reason.rpartition("; ")[2].removesuffix(" comes nearest") in policies
    # Sites of each kind, scores and rules for positions: what is fitted can be inserted.
    captured = capture_call(shared(family), call.inputs, in_tower=family in ALL_LOWERED)
    for name, policy in policies.items():
        if family in ALL_LOWERED or name in ("avg_pool", "random", "pyramid_drop", "fitprune"):
            assert lower_call(captured.copy(), policy, call.layout).graph, name


def test_inputs_of_a_call_show_which_patches_make_a_token() -> None:
    model, batch = shared("gemma4"), prompts("gemma4")
    with pytest.raises(ValueError, match="or only a call shows it .in Python, give example_inputs"):
        presets.fit("fastervlm", 16, model, (8, 8))
    (step,) = presets.fit("fastervlm", 16, model, (8, 8), batch).reductions
    assert (step.site, step.scores) == ("vision.1", {"mutual_attention": 1.0})
    sites = capture_call(model, call_of(model, batch | {"use_cache": False}).inputs).sites
    assert sites is not None and sites.usable(step.site, step.scores)


def test_features_of_several_blocks_leave_the_last_one_to_the_projector() -> None:
    """vipllava reads its last blocks: a reduction after one of them would not be passed by all."""
    policy = presets.fit("visionzip", 16, shared("vipllava"))
    (step,) = policy.reductions
    assert (step.site, step.keep_class) == ("projector", False)
    assert step.similarity == {"key": 1.0} and step.scores == {"cls_attention": 1.0}
    assert {r.site for r in presets.fit("tome", 60, shared("vipllava")).reductions} == {"vision.0"}


@pytest.mark.parametrize("name", sorted(TOWER))
def test_without_a_class_token_patches_rank_by_the_attention_of_all(name: str) -> None:
    model, batch = shared("paligemma"), prompts("paligemma", 2)
    policy = presets.fit(name, 24, model)
    scores = {
        score for step in policy.reductions for tier in step.selection for score in tier.scores
    }
    assert not scores & {"cls_attention", "joint_cls_attention"}
    assert name == "tome" or "mutual_attention" in scores
    with torch.no_grad():
        assert transform(model, policy=policy)(**batch).logits.isfinite().all()


def test_a_random_choice_needs_no_known_places() -> None:
    model, batch = shared("llava_next"), prompts("llava_next")
    policy = presets.fit("random", 20, model, (1, 80))
    share = CostModel.of_call(call_of(model, batch)).for_any_size(policy)
    with torch.no_grad():
        cache = transform(model, policy=share)(**batch, use_cache=True)
    assert cache.logits.shape[1] == batch["input_ids"].shape[1] - 60


def test_stages_move_to_layers_that_attend_and_have_a_site() -> None:
    # lfm2_vl: attention in layers 2 and 4 of 5 alone.
    drop = presets.fit("pyramid_drop", 16, shared("lfm2_vl"), (4, 8))
    assert [step.site for step in drop.reductions] == ["decoder.1", "decoder.3"]
    fastv = presets.fit("fastv", 24, shared("lfm2_vl"), (4, 8))
    assert [step.site for step in fastv.reductions] == ["decoder.2"]
    # The last two of these layers attend to keys of decoder_2 and decoder_1.
    config = FAMILIES["gemma4"].config()
    config.text_config.layer_types = [
        *("sliding_attention", "full_attention", "sliding_attention"),
        *("sliding_attention", "full_attention"),
    ]
    config.text_config.num_kv_shared_layers = 2
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config).eval()
    drop = presets.fit("pyramid_drop", 24, model, (1, 32))
    assert [step.site for step in drop.reductions] == ["decoder.0"]


def test_images_of_any_size_have_rows_and_columns() -> None:
    model = shared("qwen2_5_vl")
    assert presets.fit("avg_pool", 8, model, (4, 8)).counts(32) == [8]
    with pytest.raises(ValueError, match="avg_pool cannot be fitted: .*; merge comes nearest"):
        presets.fit("avg_pool", 8, model, 32)
