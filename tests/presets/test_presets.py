"""Presets: what they are, as published."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
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
