"""The invariants on many families, against the original model with dropped tokens masked."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from closeness import assert_close, roundings_of
from families import (
    FAMILIES,
    IMAGE,
    REFUSED,
    STATEFUL,
    TWINS,
    alone,
    continued,
    prompts,
    shared,
)
from masked import alive_of, assert_pruning_is_masking, generate, layers_of, masked_from
from shortened import assert_reduced_is_shortened, shortened_from
from tiny import call_of
from torch import Tensor

import deos_fx
from deos_fx.errors import CaptureError
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.pipeline import capture_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

NORM = {"scores": {"feature_norm": 1.0}}
PRUNED = {
    "projector": (Reduction("projector", 0.25, **NORM),),
    "decoder": (Reduction("decoder.1", 0.25, **NORM),),
    "both": (Reduction("projector", 0.5, **NORM), Reduction("decoder.2", 0.25)),
}
ENDS = {"llava_next": 8, "llava_onevision": 8}
every_family = pytest.mark.parametrize("name", FAMILIES)


def reduce(name: str, reductions: tuple[Reduction, ...] = ()) -> ReducedModel:
    model = shared(name)
    if facts_of(model).counts_positions:
        # Its layers know no other positions.
        reductions = tuple(replace(step, position="compact") for step in reductions)
    if name == "git":
        # The attention of its layers cannot be observed.
        reductions = tuple(replace(step, **NORM) for step in reductions)
    return ReducedModel(model, Policy(reductions))


@contextlib.contextmanager
def outputs_of(layer: Any) -> Iterator[list[Tensor]]:
    """What a decoder layer gives in every call."""
    found: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = layer.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


# *** 1: the empty policy changes nothing ***


@every_family
def test_the_empty_policy_is_bit_identical(name: str) -> None:
    model, batch = shared(name), prompts(name, 2)
    assert torch.equal(reduce(name)(**batch).logits, model(**batch).logits)
    for ours, theirs in zip(generate(reduce(name), batch), generate(model, batch), strict=True):
        assert torch.equal(ours, theirs)


# *** 2: keeping everything changes nothing but rounding ***


@every_family
@pytest.mark.parametrize("site", ["projector", "decoder.1"])
def test_keeping_all_tokens_changes_nothing(name: str, site: str) -> None:
    batch = prompts(name, 2)
    kept_all = reduce(name, (Reduction(site, 1.0, gain=1.0, mass_bias=1.0, **NORM),))
    real = batch["attention_mask"].bool()
    expected = shared(name)(**batch).logits[real]
    assert_close(kept_all(**batch).logits[real], expected, roundings_of(name))


# *** 3 and 5: pruning equals masking, in the prefill and token by token ***


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *itertools.product([name for name in FAMILIES if name not in STATEFUL], PRUNED),
        *itertools.product(sorted(TWINS.keys() - set(STATEFUL)), ["both"]),
    ],
)
def test_pruning_is_masking(name: str, policy: str) -> None:
    # Without padding most masks are None; with it they are not.
    batch = prompts(name, 1 if policy == "both" else 2)
    assert_pruning_is_masking(shared(name), reduce(name, PRUNED[policy]), batch, roundings_of(name))


@every_family
def test_the_smallest_tokens_are_dropped(name: str) -> None:
    model, batch = shared(name), prompts(name, 2)
    alive = alive_of(reduce(name, PRUNED["decoder"])(**batch)[CACHE], batch["input_ids"])
    with outputs_of(layers_of(model)[1]) as hidden:
        model(**batch)
    norms, text = hidden[0].norm(dim=-1), batch["input_ids"] != IMAGE
    dropped = norms.masked_fill(alive[2], 0.0).amax(dim=1, keepdim=True)
    small = (norms < dropped) & alive[2] & ~text
    # Ends of rows stay, whatever their norm.
    assert small.sum() == len(small) * ENDS.get(name, 0)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *itertools.product([name for name in FAMILIES if name in STATEFUL], PRUNED),
        *itertools.product(sorted((TWINS.keys() & set(STATEFUL)) - REFUSED), ["both"]),
    ],
)
def test_dropped_tokens_are_not_in_the_sequence(name: str, policy: str) -> None:
    # Layers with a state have no keys to hide: they run over what is kept.
    reduced = reduce(name, PRUNED[policy])
    prompt = alone(name, prompts(name, 1), 0)
    longer = functools.partial(continued, name, prompt)
    assert_reduced_is_shortened(shared(name), reduced, prompt, longer, roundings_of(name))


# *** 6: a padded batch gives each prompt what it gets alone ***


def assert_rows_are_independent(name: str, model: Any) -> None:
    """Fail unless a model of a family, reduced or not, says the same in a padded batch."""
    batch = prompts(name, 2)
    tokens, logits = generate(model, batch)
    for row in range(2):
        own_tokens, own_logits = generate(model, alone(name, batch, row))
        assert torch.equal(own_tokens[0], tokens[row])
        assert_close(own_logits[0], logits[row], roundings_of(name))


# Padding changes what these say, with reductions and without: Kosmos counts it among positions.
PADDED = {"kosmos-2", "kosmos-2.5", "hunyuan_vl"}


@pytest.mark.parametrize(
    "name", [name for name in [*FAMILIES, *sorted(TWINS)] if name not in PADDED | REFUSED]
)
@pytest.mark.parametrize("policy", ["both"])
def test_rows_of_a_batch_are_independent(name: str, policy: str) -> None:
    assert_rows_are_independent(name, reduce(name, PRUNED[policy]))


# *** 9: a saved model is the same when it is loaded ***


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TWINS])
def test_a_saved_model_is_the_same(name: str, tmp_path: Path) -> None:
    batch, reduced = prompts(name, 2), reduce(name, PRUNED["projector"])
    reduced.save_pretrained(tmp_path)
    again = ReducedModel.from_pretrained(tmp_path)
    assert again.policy == reduced.policy
    # Where a weight lies in memory may decide how a product is added up.
    assert_close(again(**batch).logits, reduced(**batch).logits)


# *** what belongs to one kind of family ***


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_ends_of_rows_are_never_dropped(name: str) -> None:
    batch = prompts(name)
    # 16 tokens of the whole image, then 8 rows of 8 and an end each, behind 3 tokens of text.
    ends = [3 + 16 + 9 * row + 8 for row in range(8)]
    for reductions in PRUNED.values():
        origin = reduce(name, reductions)(**batch)[CACHE].spaces[-1].origin[0].tolist()
        assert {*ends} < {*origin}


@pytest.mark.parametrize("name", ["pixtral", "qwen2_5_vl"])
def test_an_image_of_another_size_is_seen(name: str) -> None:
    batch, model = prompts(name), shared(name)
    reduced = reduce(name, (Reduction("decoder.1", 1.0),))
    reduced(**batch)
    if name == "pixtral":
        batch["image_sizes"] = torch.tensor([[32, 16]])
    else:
        batch["image_grid_thw"] = torch.tensor([[1, 16, 8]])
    assert_close(reduced(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["got_ocr2"])
def test_sites_that_cannot_be_used_say_why(name: str) -> None:
    inputs = call_of(shared(name), prompts(name) | {"use_cache": False}).inputs
    sites = capture_call(shared(name), inputs).sites
    assert sites is not None
    assert {site.name for site in sites.available()} == {
        "projector",
        *(f"decoder.{i}" for i in range(4)),
    }
    assert all(site.reason for site in sites.sites if site.name.startswith("vision"))


def test_layers_without_attention_say_so() -> None:
    inputs = call_of(shared("qwen3_5"), prompts("qwen3_5") | {"use_cache": False}).inputs
    sites = capture_call(shared("qwen3_5"), inputs).sites
    assert sites is not None
    assert [site.name for site in sites.sites if site.lacks] == [f"decoder.{i}" for i in (0, 1, 3)]
    assert "key_norm" in sites["decoder.2"].scores
    with pytest.raises(ValueError, match="no score 'key_norm' .its layer does not attend"):
        reduce("qwen3_5", (Reduction("decoder.1", 0.5, scores={"key_norm": 1.0}),))(
            **prompts("qwen3_5")
        )
    merge = Reduction("decoder.1", 0.5, gain=1.0, similarity={"key": 1.0}, **NORM)
    with pytest.raises(ValueError, match="no keys: decoder_1 does not attend"):
        reduce("qwen3_5", (merge,))(**prompts("qwen3_5"))


def test_models_without_visual_tokens_are_refused() -> None:
    vision = {"hidden_size": 32, "attention_heads": 2, "image_size": 32, "patch_size": 8}
    crossing = hf.MllamaConfig(
        vision_config={**vision, "num_hidden_layers": 2, "intermediate_layers_indices": [0]},
        text_config={"hidden_size": 32, "num_hidden_layers": 3, "cross_attention_layers": [1]},
    )
    with torch.device("meta"):
        model = hf.MllamaForConditionalGeneration(crossing)
    with pytest.raises(CaptureError, match="cross-attention"):
        facts_of(model)


def test_layers_that_see_the_same_chosen_keys_have_the_same_tokens() -> None:
    closed = {
        "glm5_next_shared": (0, "decoder_1 takes what is handed on by decoder_0, which still has"),
        "mistral_large4": (3, "decoder_4 attends to keys of decoder_3, which still has"),
    }
    for name, (between, reason) in closed.items():
        inputs = call_of(shared(name), prompts(name) | {"use_cache": False}).inputs
        sites = capture_call(shared(name), inputs).sites
        assert sites is not None
        assert [site.name for site in sites.available() if "vision" not in site.name] == [
            "projector",
            *(f"decoder.{i}" for i in range(4) if i != between),
        ]
        assert reason in sites[f"decoder.{between}"].reason


def test_masses_do_not_bias_what_an_index_chooses() -> None:
    merge = Reduction("projector", 0.5, gain=1.0, mass_bias=1.0, **NORM)
    with pytest.raises(ValueError, match="a bias would change what they choose. Use mass_bias=0"):
        reduce("glm5_next", (merge,))(**prompts("glm5_next"))
    # transform chooses what works.
    batch = prompts("glm5_next")
    reduced = deos_fx.transform(shared("glm5_next"))
    assert reduced(**batch).logits.shape[1] < batch["input_ids"].shape[1]


def test_keys_that_later_layers_attend_to_are_not_dropped_before_them() -> None:
    # The last two of gemma4's layers attend to keys of decoder_2 and decoder_1.
    config = FAMILIES["gemma4"].config()
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config.text_config.layer_types = [*kinds, "sliding_attention", "full_attention"]
    config.text_config.num_kv_shared_layers = 2
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    inputs = call_of(model, prompts("gemma4") | {"use_cache": False}).inputs
    sites = capture_call(model, inputs).sites
    assert sites is not None
    names = [site.name for site in sites.available()]
    assert [name for name in names if not name.startswith("vision.")] == ["projector", "decoder.0"]
    assert "attends to keys of decoder_1, which still has" in sites["decoder.2"].reason


def test_masks_of_blocks_without_marks_of_images() -> None:
    # The model makes up what it is not given, as long as its prompt.
    model, batch = shared("gemma4_unified"), prompts("gemma4_unified")
    del batch["mm_token_type_ids"]
    output = reduce("gemma4_unified", PRUNED["both"])(**batch)
    alive = alive_of(output[CACHE], batch["input_ids"])
    with masked_from(model, alive):
        whole = model(**batch).logits
    assert_close(output.logits[0], whole[alive[output[CACHE].spaces[-1].first_layer]])


def test_layers_that_count_positions_take_no_others() -> None:
    model, batch = shared("inkling_mm_model"), prompts("inkling_mm_model")
    with pytest.raises(ValueError, match="count the tokens that they get: use position='compact'"):
        ReducedModel(model, Policy((Reduction("projector", 0.25, **NORM),)))(**batch)
    # transform chooses what works.
    assert deos_fx.transform(model)(**batch).logits.shape[1] < batch["input_ids"].shape[1]


def test_learned_frequencies_are_of_the_new_positions() -> None:
    model, batch = shared("mistral_large4"), prompts("mistral_large4")
    output = reduce("mistral_large4", (Reduction("decoder.1", 0.25, position="compact"),))(**batch)
    left = output[CACHE].spaces[-1].origin[0]
    with shortened_from(model, {2: left}, counted=True):
        whole = model(**batch, use_cache=False).logits
    assert_close(output.logits, whole[:, left])


@pytest.mark.parametrize("position", ["compact", "grid"])
def test_positions_with_coordinates_are_kept(position: str) -> None:
    reductions = (Reduction("decoder.1", 0.25, position=position),)
    with pytest.raises(ValueError, match="have several coordinates: use position='keep'"):
        reduce("qwen2_vl", reductions)(**prompts("qwen2_vl", 1))
