"""Invariant 4: with saturated gates the relaxed graph's logits equal the static graph's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import ROUNDINGS, assert_close, roundings_of
from families import FAMILIES, prompts, shared
from learned import learned_at
from tiny import call_of, inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.models.families import FORMER_IMAGES
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.index import take

REGIMES: dict[str, dict[str, Any]] = {
    "prune": {},
    "merge": {"gain": 1.0},
    "merge with mass bias": {"gain": 1.0, "mass_bias": 1.0},
    "pool": {"selector": "grid", "gain": 1.0, "similarity": {"grid": 1.0}},
    "uniform": {"gain": 1.0, "temperature": math.inf},
    "soft": {"gain": 0.5, "temperature": 0.3, "mass_bias": 0.5},
    "residual": {"gain": 0.25, "residual": True},
    "reweight": {"reweight": 0.3},
    "weighted by score": {"gain": 1.0, "temperature": 0.1, "weighting": "score"},
    "diverse": {"selector": "greedy", "diversity": 0.5},
    "compact": {"position": "compact"},
    "grid positions": {"position": "grid"},
    "of the next block": {"observe": "next"},
}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=5)


def assert_relaxed_is_static(
    model: Any,
    policy: Policy,
    batch: dict[str, Any] | None = None,
    roundings: float = ROUNDINGS,
    runners_up: int | None = None,
) -> None:
    """With saturated gates, a policy's relaxed graph gives the logits of its static graph."""
    batch = batch or inputs(model, batch=2)
    named = {"pixel_values" if key in FORMER_IMAGES else key: x for key, x in batch.items()}
    call = call_of(model, named | {"use_cache": False})
    given, layout = call.inputs, call.layout
    captured = capture_call(model, given)
    relaxed = captured.copy()
    reductions = {}
    present = layout.tokens_per_image
    for reduction, count in zip(policy.reductions, policy.counts(present), strict=True):
        relaxed_one = RelaxedReduction.from_reduction(reduction, count / present)
        relaxed_one.runners_up = runners_up
        reductions[reduction.site], present = relaxed_one, count
    assert captured.sites is not None
    graph = insert_relaxed(relaxed.graph_module, captured.sites, reductions, layout)
    static = lower_call(captured.copy(), policy, layout)
    names = [node.target for node in static.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        expected = static(**{name: given[name] for name in names})
        found = graph(**{name: given[name] for name in names})
    origin = expected["spaces"][-1]["origin"]
    real = take(given["attention_mask"], origin).bool()
    # The tokens of the static graph among those that are left in the relaxed one.
    place = (origin.unsqueeze(-1) == found["spaces"][-1]["origin"].unsqueeze(1)).long()
    assert place.sum(-1).eq(1).all()
    logits = take(found["logits"], place.argmax(-1))
    assert_close(logits[real], expected["logits"][real], roundings)


@pytest.mark.parametrize("site", ["vision.0", "vision.1", "projector", "decoder.0", "decoder.2"])
@pytest.mark.parametrize("regime", REGIMES)
def test_saturated_relaxed_graph_equals_static(
    model: LlavaForConditionalGeneration, site: str, regime: str
) -> None:
    policy = Policy((Reduction(site, 16, **REGIMES[regime]),))
    assert_relaxed_is_static(model, policy)


@pytest.mark.parametrize("site", ["vision.1", "projector", "decoder.0", "decoder.2"])
@pytest.mark.parametrize("runners_up", [None, 0, 7])
def test_learned_parts(
    model: LlavaForConditionalGeneration, site: str, runners_up: int | None
) -> None:
    assert_relaxed_is_static(model, Policy((learned_at(site, 16),)), runners_up=runners_up)


@pytest.mark.parametrize("runners_up", [0, 5])
@pytest.mark.parametrize("position", ["keep", "compact", "grid"])
def test_runners_up_change_nothing_while_their_gates_are_closed(
    model: LlavaForConditionalGeneration, position: str, runners_up: int
) -> None:
    policy = Policy(
        (
            Reduction("projector", 32, gain=1.0, mass_bias=1.0, position=position),
            Reduction("decoder.1", 16, gain=0.5, temperature=0.2, mass_bias=0.5, position=position),
            Reduction("decoder.2", 8, position=position),
        )
    )
    assert_relaxed_is_static(model, policy, runners_up=runners_up)


def test_several_sites_with_different_regimes(model: LlavaForConditionalGeneration) -> None:
    policy = Policy(
        (
            Reduction("projector", 32, gain=1.0, mass_bias=1.0),
            Reduction("decoder.1", 16, gain=0.5, temperature=0.2, mass_bias=0.5),
            Reduction("decoder.2", 8, position="compact"),
        )
    )
    assert_relaxed_is_static(model, policy)


@pytest.mark.parametrize("position", ["keep", "compact", "grid"])
def test_sites_all_along_the_tower(position: str) -> None:
    model = tiny_llava(layers=3, blocks=5)
    policy = Policy(
        (
            Reduction("vision.0", 48, gain=1.0, similarity={"key": 1.0}, mass_bias=1.0),
            Reduction("vision.1", 40, scores={"key_norm": 1}, position=position),
            Reduction("vision.3", 24, gain=0.5, temperature=0.2, mass_bias=0.5),
            Reduction("projector", 16, gain=1.0, mass_bias=1.0),
            Reduction("decoder.0", 8, mass_bias=0.5),
        )
    )
    assert_relaxed_is_static(model, policy)
    assert_relaxed_is_static(model, Policy(policy.reductions[:2]))


def test_sites_of_a_tower_without_class_token() -> None:
    model = tiny_llava(layers=2, tower="siglip")
    scores = {"scores": {"key_norm": 1.0}}
    policy = Policy(
        (
            Reduction("vision.0", 40, gain=1.0, mass_bias=1.0, **scores),
            Reduction("projector", 8, scores={"novelty": 1.0}),
        )
    )
    assert_relaxed_is_static(model, policy)


# Scores that no two tokens share, also in layers with windows: a tie leaves two gates half open.
NORM: dict[str, Any] = {"scores": {"feature_norm": 1.0}}
IN_FAMILIES = {
    "prune": (
        Reduction("projector", 0.5, **NORM),
        Reduction("decoder.1", 0.25, **NORM),
    ),
    "merge": (
        Reduction("projector", 0.5, gain=0.5, temperature=0.3, mass_bias=0.5, **NORM),
        Reduction("decoder.0", 0.25, gain=1.0, **NORM),
        Reduction("decoder.2", 0.125, gain=1.0, mass_bias=1.0, **NORM),
    ),
}


# Chameleon's features are rows of a codebook: many tokens of an image are the same.
@pytest.mark.parametrize("regime", IN_FAMILIES)
@pytest.mark.parametrize("name", sorted({*FAMILIES, "git"} - {"chameleon", "llama4"}))
def test_families(name: str, regime: str) -> None:
    policy = Policy(IN_FAMILIES[regime])
    assert_relaxed_is_static(shared(name), policy, prompts(name, 2), roundings_of(name))


@pytest.mark.parametrize("position", ["keep", "compact"])
@pytest.mark.parametrize("name", ["llava_falcon_h1", "inkling_mm_model"])
def test_layers_that_attend_and_keep_a_state_are_refused(name: str, position: str) -> None:
    # Whatever the policy: which positions a model allows (Inkling: compact) is told afterwards.
    policy = Policy(tuple(replace(each, position=position) for each in IN_FAMILIES["prune"]))
    with pytest.raises(ValueError, match="decoder_0 gets a mask of keys and one of padding"):
        assert_relaxed_is_static(shared(name), policy, prompts(name, 2))


@pytest.mark.skipif(
    "llama4" not in FAMILIES, reason="this version of transformers fails in Llama 4 itself"
)
def test_layers_that_count_positions_are_refused() -> None:
    steps = tuple(replace(each, position="compact") for each in IN_FAMILIES["prune"])
    with pytest.raises(ValueError, match="decoder_0 counts the tokens that it gets, and in a sear"):
        assert_relaxed_is_static(shared("llama4"), Policy(steps), prompts("llama4", 2))


def test_layers_that_choose_keys_are_refused() -> None:
    policy = Policy(IN_FAMILIES["prune"])
    with pytest.raises(ValueError, match="decoder_2 chooses the keys that a token sees by an ind"):
        assert_relaxed_is_static(shared("glm5_next"), policy, prompts("glm5_next", 2))


@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5"])
def test_runners_up_are_not_in_the_sequence_of_a_state(name: str) -> None:
    policy, batch = Policy(IN_FAMILIES["merge"]), prompts(name, 2)
    assert_relaxed_is_static(shared(name), policy, batch, roundings_of(name), runners_up=3)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "llava_next"])
def test_families_with_eager_attention(name: str) -> None:
    model = shared(name)
    model.set_attn_implementation("eager")
    try:
        assert_relaxed_is_static(model, Policy(IN_FAMILIES["merge"]), prompts(name, 2))
    finally:
        model.set_attn_implementation("sdpa")


RELAXED: dict[str, dict[str, Any]] = {
    "raters": {"scores": {"rater_attention": 1.0}},
    "mutual": {"scores": {"mutual_attention": 1.0}},
    "products": {"scores": {"agreed_attention": 1.0}},
    "next": {"observe": "next", "gain": 1.0, "similarity": {"key": 1.0}},
    "earlier": {"observe": "decoder.1"},
}


@pytest.mark.parametrize("case", RELAXED)
def test_relaxed_and_static_reductions_see_the_same(case: str) -> None:
    first = Reduction("decoder.0", 48, scores={"feature_norm": 1.0})
    reduction = Reduction("decoder.2", 16, **RELAXED[case])
    assert_relaxed_is_static(tiny_llava(5), Policy((first, reduction)))


@pytest.mark.parametrize(
    "change",
    [
        {"scores": {"mutual_attention": 1.0}},
        {"scores": {"joint_cls_attention": 1.0}, "observe": "next"},
        {"scores": {"cls_attention": 1.0}, "observe": "vision.1"},
        {"similarity": {"key": 1.0}, "gain": 1.0, "observe": "next"},
    ],
)
def test_relaxed_and_static_towers_see_the_same(change: dict[str, Any]) -> None:
    first = Reduction("vision.0", 48, scores={"feature_norm": 1.0})
    reduction = Reduction("projector", 16, **{"scores": {"cls_attention": 1.0}, **change})
    assert_relaxed_is_static(tiny_llava(5), Policy((first, reduction)))
