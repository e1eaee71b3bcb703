"""Presets: what they are, and how they are fitted to a budget."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from deos_fx import presets
from deos_fx.forms.static import static_reduce
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

PUBLISHED = {name: method.function() for name, method in presets.CATALOGUE.items()}


def _grid(side: int) -> Tensor:
    return torch.tensor([[0, row, column] for row in range(side) for column in range(side)])


def test_names_match_the_policies() -> None:
    assert {name: policy.name for name, policy in PUBLISHED.items()} == {
        name: name for name in presets.names()
    }
    assert [method.name for method in presets.list()] == presets.names() == sorted(PUBLISHED)
    assert set(presets.fitted()) <= set(PUBLISHED)


@pytest.mark.parametrize("method", presets.list(), ids=presets.names())
def test_presets_round_trip_and_cite_their_source(method: presets.Method) -> None:
    policy = method.function()
    assert Policy.from_json(policy.to_json()) == policy
    assert getattr(presets, method.name) is method.function
    documentation = method.function.__doc__ or ""
    assert "ource" in documentation or "arXiv" in documentation
    assert method.title.endswith(".") and method.source and method.licence


def test_counts_of_the_official_settings() -> None:
    counts = {name: PUBLISHED[name].counts(576) for name in PUBLISHED}
    assert counts["fastv"] == [288]
    assert counts["pyramid_drop"] == [288, 144, 72]
    assert counts["sparsevlm_plus"] == [300, 200, 118]
    assert counts["visionzip"] == [64]
    assert counts["prumerge"] == [int(576 / 8) + 1]
    assert counts["divprune"] == [round(0.098 * 576)]
    assert counts["dart"] == [4 + 8 * int(576 * (1 - 0.778) / 8)]
    assert counts["evit"] == [405, 285, 201]
    assert counts["tome"] == [576 - 16 * (i + 1) for i in range(23)]
    assert counts["fitprune"][:3] == [562, 529, 440] and counts["fitprune"][-1] == 576 - 449
    assert counts["vscan"] == [96, 32]


def test_published_sites_and_positions() -> None:
    assert [(r.site, r.keep, r.position) for r in presets.fastv().reductions] == [
        ("decoder.1", 0.5, "keep")
    ]
    assert [(r.site, r.keep, r.position) for r in presets.pyramid_drop().reductions] == [
        ("decoder.7", 0.5, "compact"),
        ("decoder.15", 0.25, "compact"),
        ("decoder.23", 0.125, "compact"),
    ]


def test_a_preset_for_every_regime() -> None:
    regimes = {name: policy.reductions[0].regime for name, policy in PUBLISHED.items()}
    assert regimes["fastv"] == regimes["divprune"] == "prune"
    assert regimes["merge"] == regimes["tome"] == "merge"
    assert regimes["avg_pool"] == regimes["bilinear_pool"] == "pool"
    assert regimes["redistribute"] == "reweight"
    assert regimes["visionzip"] == regimes["prumerge"] == regimes["evit"] == "mixed"


def test_fastv_is_top_k_of_the_last_attention() -> None:
    tokens, attention = torch.randn(2, 30, 4), torch.rand(2, 30)
    reduction = presets.fastv(keep=8).reductions[0]
    result = static_reduce(reduction, 8, tokens, None, {"attention_last": attention})
    for row in range(2):
        expected = sorted(torch.topk(attention[row], 8).indices.tolist())
        assert result.kept[row].tolist() == expected
        assert torch.equal(result.tokens[row], tokens[row, expected])


@pytest.mark.parametrize(("side", "keep", "window"), [(12, 16, 3), (12, 36, 2), (24, 36, 4)])
def test_avg_pool_is_avg_pool2d(side: int, keep: int, window: int) -> None:
    tokens = torch.randn(3, side * side, 5, dtype=torch.float64)
    reduction = presets.avg_pool(keep=keep).reductions[0]
    result = static_reduce(reduction, keep, tokens, None, {"grid": _grid(side)})
    image = tokens.mT.unflatten(-1, (side, side))
    expected = F.avg_pool2d(image, window).flatten(2).mT
    # Shares of windows are constants in single precision.
    assert_close(result.tokens.float(), expected.float())
    assert torch.equal(result.mass, torch.full((3, keep), float(window**2)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="layer is 0; FastV ranks by the layer before"):
        presets.fastv(layer=0)
    with pytest.raises(ValueError, match="one length"):
        presets.pyramid_drop(layers=(8, 16), keep=(0.5,))
    with pytest.raises(ValueError, match="at least 1"):
        presets.pyramid_drop(layers=(0,), keep=(0.5,))
    with pytest.raises(ValueError, match="layer is 0; DART reads the keys of the layer before"):
        presets.dart(layer=0)
    with pytest.raises(ValueError, match="the schedule drops 576 of 576 tokens"):
        presets.fitprune(drops=(576,))


def test_mean_visual_tokens() -> None:
    mean = presets.mean_visual_tokens
    assert mean(Policy(), 10, 144) == 144
    assert mean(presets.merge(keep=18), 10, 144) == 18
    assert mean(presets.fastv(layer=2, keep=44), 10, 144) == (2 * 144 + 8 * 44) / 10
    assert mean(presets.pyramid_drop(), 32, 576) == 576 * (1 + 1 / 2 + 1 / 4 + 1 / 8) / 4
    both = Policy(
        (Reduction("vision.1", 80), Reduction("projector", 40), Reduction("decoder.0", 10))
    )
    assert mean(both, 4, 144) == (40 + 3 * 10) / 4


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(presets.fitted()),
    st.floats(0.02, 1),
    st.integers(2, 40),
    st.integers(3, 24),
)
def test_fit_meets_the_budget_or_says_why(
    name: str, fraction: float, layers: int, side: int
) -> None:
    tokens = side * side
    budget = max(fraction * tokens, 1)
    try:
        policy = presets.fit(name, budget, layers, tokens)
    except ValueError as error:
        assert "cannot meet a mean of" in str(error)
        earliest = (tokens + layers - 1) / layers
        assert name in ("fastv", "pyramid_drop") and budget < earliest
        return
    assert policy.name == name
    assert presets.mean_visual_tokens(policy, layers, tokens) <= budget + 1e-9
    assert policy.counts(tokens)[-1] >= 1


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["fastv", "merge", "redistribute"]), st.floats(0.13, 0.9))
def test_fit_uses_the_whole_budget(name: str, fraction: float) -> None:
    policy = presets.fit(name, fraction * 144, 10, 144)
    (reduction,) = policy.reductions
    larger = Policy((Reduction(reduction.site, int(reduction.keep) + 1),))
    assert presets.mean_visual_tokens(larger, 10, 144) > fraction * 144


@pytest.mark.parametrize("name", presets.fitted())
def test_fit_with_everything_allowed_keeps_everything(name: str) -> None:
    assert set(presets.fit(name, 576, 32, 576).counts(576)) == {576}


def test_fit_at_published_depth_where_possible() -> None:
    sites = [r.site for r in presets.fit("pyramid_drop", 270, 32, 576).reductions]
    assert sites == ["decoder.7", "decoder.15", "decoder.23"]
    assert presets.fit("pyramid_drop", 270, 32, 576).counts(576) == [288, 144, 72]
    assert presets.fit("fastv", 288, 32, 576).reductions[0].site == "decoder.1"


def test_fit_moves_to_earlier_layers_for_small_budgets() -> None:
    fastv = presets.fit("fastv", 18, 10, 144)
    assert (fastv.reductions[0].site, fastv.reductions[0].keep) == ("decoder.0", 4)
    drop = presets.fit("pyramid_drop", 18, 10, 144)
    assert [r.site for r in drop.reductions] == ["decoder.0", "decoder.3", "decoder.6"]
    assert drop.counts(144) == [6, 3, 2]


def test_fit_of_pooling_takes_squarish_windows() -> None:
    assert presets.fit("avg_pool", 18, 10, 144).counts(144) == [16]
    assert presets.fit("avg_pool", 72, 10, 144).counts(144) == [72]
    with pytest.raises(ValueError, match="145 is not a square"):
        presets.fit("avg_pool", 18, 10, 145)


def test_fit_refuses() -> None:
    with pytest.raises(ValueError, match="no preset 'best'; choose from fastv, pyramid_drop"):
        presets.fit("best", 18, 10, 144)
    with pytest.raises(ValueError, match="at least 1"):
        presets.fit("merge", 0.125, 10, 144)
    with pytest.raises(ValueError, match="at least 1"):
        presets.fit("merge", math.nan, 10, 144)
