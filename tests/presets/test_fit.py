"""Presets fitted to a budget and to the depth of a model, and why some cannot be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import prompts, shared
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import inputs, shared_llava

from deos_fx import presets
from deos_fx.policy.policy import Policy
from deos_fx.presets.fitting import fit_to_shape
from deos_fx.presets.rules import RULES
from deos_fx.presets.shape import Shape
from deos_fx.runtime.reduced_model import ReducedModel

NAMES = presets.names()
PUBLISHED = {name: method.function() for name, method in presets.CATALOGUE.items()}
# LLaVA-1.5-7B: features come out of the last but one of the 24 blocks of CLIP ViT-L.
LLAVA = Shape(
    decoder_layers=32,
    visual_tokens=576,
    grid=(24, 24),
    vision_blocks=24,
    used_blocks=23,
    tower_sites=23,
    class_token=True,
)
SMALL = Shape(
    decoder_layers=10,
    visual_tokens=144,
    grid=(12, 12),
    vision_blocks=4,
    used_blocks=4,
    tower_sites=4,
    class_token=True,
)


def fitted(name: str, budget: float, shape: Shape, **values: Any) -> Policy:
    return fit_to_shape(name, budget, shape, values)[0]


def mean(policy: Policy, shape: Shape) -> float:
    return presets.mean_visual_tokens(policy, shape.decoder_layers, shape.visual_tokens)


def sites(policy: Policy) -> list[str]:
    return [reduction.site for reduction in policy.reductions]


def test_every_preset_has_a_rule() -> None:
    assert set(RULES) == set(NAMES)


# *** the model at hand ***


def test_the_shape_of_a_model() -> None:
    model = shared_llava()
    assert Shape.of(model) == Shape(
        decoder_layers=6,
        visual_tokens=64,
        grid=(8, 8),
        vision_blocks=3,
        used_blocks=2,
        tower_sites=2,
        class_token=True,
    )
    siglip = Shape.of(shared_llava(tower="siglip"))
    assert (siglip.used_blocks, siglip.class_token) == (2, False)
    varying = Shape.of(shared("qwen2_5_vl"), 36)
    assert (varying.grid, varying.used_blocks, varying.class_token) == ((6, 6), 2, False)
    assert varying.in_groups and not siglip.in_groups


def test_the_number_of_tokens_is_asked_for_where_sizes_decide_it() -> None:
    with pytest.raises(ValueError, match="depends on its size: give visual_tokens"):
        presets.fit("merge", 8, shared("qwen2_5_vl"))
    assert presets.fit("merge", 8, shared("qwen2_5_vl"), 36).counts(36) == [8]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_model_has_the_published_places(name: str) -> None:
    """At the published depth of the model they were published for, where the budget allows it."""
    published = PUBLISHED[name]
    budget = 400.0 if name in ("evit", "fitprune") else mean(published, LLAVA)
    policy = fitted(name, budget, LLAVA)
    if name == "evit":
        # Published for the twelve blocks of DeiT.
        assert sites(policy) == ["vision.7", "vision.12", "vision.18"]
    elif name == "fitprune":
        # Layers that drop nothing depend on the counts.
        assert sites(policy)[:5] == sites(published)[:5]
    else:
        assert sites(policy) == sites(published)
    assert [r.observe for r in policy.reductions][:1] == [r.observe for r in published.reductions][
        :1
    ]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("fastv", [288]), ("pyramid_drop", [288, 144, 72]), ("sparsevlm_plus", [300, 200, 118])],
)
def test_the_published_budget_gives_the_published_counts(name: str, counts: list[int]) -> None:
    budget = mean(PUBLISHED[name], LLAVA)
    assert fitted(name, budget, LLAVA).counts(576) == counts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fastv", ["decoder.0"]),
        ("dart", ["decoder.0"]),
        ("pyramid_drop", ["decoder.1", "decoder.4", "decoder.6"]),
        ("sparsevlm_plus", ["decoder.0", "decoder.1", "decoder.4"]),
        ("vscan", ["projector", "decoder.4"]),
        ("visionzip", ["vision.3"]),
        ("vispruner", ["vision.3"]),
        ("hiprune", ["vision.3"]),
        # The attention of the block after the site is needed, and there is none after the last.
        ("prumerge", ["vision.2"]),
        ("tome", ["vision.0", "vision.1", "vision.2", "vision.3"]),
        ("evit", ["vision.0", "vision.1", "vision.2"]),
    ],
)
def test_depths_keep_their_proportion(name: str, expected: list[str]) -> None:
    assert sites(fitted(name, 72, SMALL)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fitted_runs(name: str) -> None:
    model = shared_llava()
    batch = inputs(model, batch=2)
    policy = presets.fit(name, 24, model)
    reduced = ReducedModel(model, policy)
    with torch.no_grad():
        assert reduced(**batch).logits.isfinite().all()
    assert reduced.cost(**batch).after.visual_tokens <= 24


@pytest.mark.parametrize("name", ["fastv", "pyramid_drop", "sparsevlm_plus", "dart", "fitprune"])
def test_what_observes_attention_goes_where_layers_attend(name: str) -> None:
    # Layers 2 and 4 attend; PyramidDrop observes the layer after its site.
    model, batch = shared("qwen3_5"), prompts("qwen3_5")
    policy = presets.fit(name, 24, model, 32)
    assert sites(policy) == (
        ["decoder.1", "decoder.3"] if name == "pyramid_drop" else ["decoder.2"]
    )
    reduced = ReducedModel(model, policy)
    assert reduced(**batch).logits.isfinite().all()
    assert reduced.cost(**batch).after.visual_tokens <= 24
    with pytest.raises(ValueError, match="cannot meet"):
        presets.fit(name, 8, model, 32)


# *** the budget ***


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(NAMES), st.floats(0.02, 1), st.integers(2, 40), st.integers(3, 24))
@example("fitprune", 1.0, 2, 3)
def test_fit_meets_the_budget_or_says_why(
    name: str, fraction: float, layers: int, side: int
) -> None:
    tokens = side * side
    shape = replace(LLAVA, decoder_layers=layers, visual_tokens=tokens, grid=(side, side))
    budget = max(fraction * tokens, 1)
    try:
        policy = fitted(name, budget, shape)
    except ValueError as error:
        assert "cannot meet a mean of" in str(error)
        # Only layers that see everything are too much, and tokens that a method has to have.
        in_decoder = all(site.startswith("decoder") for site in sites(PUBLISHED[name]))
        assert budget < (tokens + 3 * layers) / layers if in_decoder else budget < 4
        return
    assert policy.name == name
    assert mean(policy, shape) <= budget + 1e-9
    # A budget of everything may leave a method nothing to do: no reduction, and no counts.
    assert all(count >= 1 for count in policy.counts(tokens))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["fastv", "merge", "redistribute", "visionzip", "vispruner", "divprune"]),
    st.floats(0.13, 0.9),
)
def test_fit_uses_the_whole_budget(name: str, fraction: float) -> None:
    policy = fitted(name, fraction * 144, SMALL)
    (reduction,) = policy.reductions
    larger = Policy((replace(reduction, keep=int(reduction.keep) + 1),))
    assert mean(larger, SMALL) > fraction * 144


@pytest.mark.parametrize("name", NAMES)
def test_fit_with_everything_allowed_keeps_everything(name: str) -> None:
    assert set(fitted(name, 576, LLAVA).counts(576)) <= {576}


def test_fit_moves_to_earlier_layers_for_small_budgets() -> None:
    deep = replace(SMALL, decoder_layers=32)
    assert sites(fitted("fastv", 40, deep)) == ["decoder.1"]
    fastv = fitted("fastv", 12, deep)
    assert (sites(fastv), fastv.counts(144)) == (["decoder.0"], [7])
    drop = fitted("pyramid_drop", 18, SMALL)
    assert sites(drop) == ["decoder.0", "decoder.3", "decoder.6"]
    assert drop.counts(144) == [7, 3, 2]


def test_fit_of_pooling_takes_squarish_windows() -> None:
    assert fitted("avg_pool", 18, SMALL).counts(144) == [16]
    assert fitted("bilinear_pool", 72, SMALL).counts(144) == [72]
    line = replace(SMALL, visual_tokens=145, grid=(1, 145))
    with pytest.raises(ValueError, match="these are no square.*; merge comes nearest"):
        fitted("avg_pool", 18, line)


# *** options ***


def test_a_given_option_is_kept() -> None:
    policy = fitted("fastv", 100, SMALL, layer=5)
    assert sites(policy) == ["decoder.4"]
    # The layer is the user's, so it does not move to where the budget could be met.
    with pytest.raises(ValueError, match="fastv cannot meet a mean of 18"):
        fitted("fastv", 18, SMALL, layer=5)
    assert fitted("random", 18, SMALL, seed=7).reductions[0].options["seed"] == 7
    assert sites(fitted("merge", 100, SMALL, layer=3)) == ["decoder.2"]


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_every_option_can_be_fitted(name: str) -> None:
    ranges = RULES[name].options(SMALL)
    for key, option in ranges.items():
        assert option.low <= option.published <= option.high
        for value in (option.low, option.high):
            try:
                policy = fitted(name, 100, SMALL, **{key: value})
            except ValueError as error:
                # Late layers leave too little of the budget.
                assert key in ("layer", "blocks") and "cannot meet" in str(error)
                continue
            assert mean(policy, SMALL) <= 100


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "prumerge_plus", "vscan", "hiprune"])
@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize("budget", [3, 20])
def test_no_tier_is_left_without_a_token(name: str, end: str, budget: float) -> None:
    model = shared_llava()
    values = {key: getattr(option, end) for key, option in presets.options(name, model).items()}
    policy = presets.fit(name, budget, model, **values)
    with torch.no_grad():
        assert ReducedModel(model, policy)(**inputs(model)).logits.isfinite().all()


def test_options_of_a_model() -> None:
    (layer,) = presets.options("fastv", shared_llava()).values()
    assert (layer.published, layer.low, layer.high) == (1, 1, 5)
    assert presets.options("divprune", shared_llava()) == {}
    assert not presets.options("random", shared_llava())["seed"].tuned


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"depth": 2}, "fastv has no option 'depth' to fit with; it has layer"),
        ({"layer": 0}, "fastv: layer is 0; give a whole number from 1 to 5"),
        ({"layer": 1.5}, "layer is 1.5; give a whole number"),
        ({"layer": True}, "layer is True; give a whole number"),
    ],
)
def test_wrong_options_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        presets.fit("fastv", 32, shared_llava(), **values)


# *** models that lack something ***


def test_no_class_token() -> None:
    model = shared_llava(tower="siglip")
    # Patches rank by the attention of all patches; these two by what the default policy does.
    assert presets.fit("fastervlm", 16, model).reductions[0].scores == {"mutual_attention": 1.0}
    for name in ("merge", "redistribute"):
        assert presets.fit(name, 16, model).reductions[0].scores == {"novelty": 1.0}


def test_no_sites_in_the_tower() -> None:
    # A resampler makes each token of all patches.
    model = shared("idefics2")
    for name, other in (("tome", "merge"), ("hiprune", "divprune"), ("evit", "merge")):
        words = (
            f"{name} cannot be fitted: it reads the attention of the vision tower.*; {other} comes"
        )
        with pytest.raises(ValueError, match=words):
            presets.fit(name, 4, model, 16)
        assert presets.fit(other, 4, model, 16).name == other


def test_fit_refuses() -> None:
    model = shared_llava()
    with pytest.raises(ValueError, match="no preset 'best'; choose from fastv, pyramid_drop"):
        presets.fit("best", 18, model)
    for budget in (0.125, math.nan, True, "18"):
        with pytest.raises(ValueError, match=f"budget_tokens is {budget!r}; give a number in"):
            presets.fit("merge", budget, model)  # type: ignore[arg-type]
