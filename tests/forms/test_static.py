"""The operator: properties, independent oracles, and relaxed against static."""

from __future__ import annotations

import pytest
import torch
from behaviours import BEHAVIOURS, COUNTS, STATIC, behaviours, reduce, reduction_of
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import TOKENS, WIDTH, gather, inputs, quick, seeds

from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

# *** assignment and transfer


@behaviours
@quick
@given(seed=seeds, count=st.sampled_from(COUNTS))
def test_shapes_order_and_rows(behaviour: str, seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed)
    reduction = reduction_of(behaviour, count)
    count = reduction.count(TOKENS)
    result = reduce(reduction, tokens, mass, features)
    assert result.tokens.shape == (3, count, WIDTH)
    assert result.kept.shape == result.mass.shape == (3, count)
    in_order = result.kept if reduction.order == "position" else result.kept.sort(dim=-1).values
    assert (in_order.diff(dim=-1) > 0).all()
    row = {name: value if name == "grid" else value[1:2] for name, value in features.items()}
    alone = reduce(reduction, tokens[1:2], mass[1:2], row)
    assert torch.equal(alone.kept[0], result.kept[1])
    assert_close(alone.tokens[0], result.tokens[1])


@behaviours
@quick
@given(seed=seeds)
def test_keeping_all_is_the_identity(behaviour: str, seed: int) -> None:
    tokens, mass, features = inputs(seed)
    reduction = reduction_of(behaviour, TOKENS)
    result = reduce(reduction, tokens, mass, features)
    assert torch.equal(result.kept.sort(-1).values, torch.arange(TOKENS).expand(3, -1))
    # A fused token counts itself by its score too, even if it is alone; neighbours can be kept.
    fused = reduction.has_rest and reduction.weighting != "one" and reduction.exponent != 1
    if not reduction.neighbours:
        assert_close(result.mass, gather(mass, result.kept))
    if not (reduction.reweight or fused or reduction.neighbours):
        assert_close(result.tokens, gather(tokens, result.kept))


@behaviours
@quick
@given(seed=seeds, count=st.sampled_from([1, 4, 9, 18]))
def test_mass_is_conserved(behaviour: str, seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed)
    reduction = reduction_of(behaviour, count)
    result = reduce(reduction, tokens, mass, features)
    total = result.mass.sum(-1)
    if reduction.assignment != "similar":
        assert (result.mass >= gather(mass, result.kept)).all()
    elif reduction.gain == 1 or reduction.residual:
        assert_close(total, mass.sum(-1))
    else:
        kept = gather(mass, result.kept).sum(-1)
        expected = kept + reduction.gain * (mass.sum(-1) - kept)
        assert_close(total, expected)


@behaviours
def test_no_masses_are_masses_of_one(behaviour: str) -> None:
    tokens, _, features = inputs(0)
    reduction = reduction_of(behaviour, 9)
    ones = reduce(reduction, tokens, torch.ones(3, TOKENS), features)
    none = reduce(reduction, tokens, None, features)
    assert_close(none.tokens, ones.tokens)
    if none.mass is None:
        assert reduction.gain == 0
        assert torch.equal(ones.mass, torch.ones(ones.kept.shape))
    else:
        assert_close(none.mass, ones.mass)


@behaviours
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(behaviour: str, dtype: torch.dtype) -> None:
    tokens, mass, features = inputs(0)
    rounded = {
        name: value if name == "grid" else value.to(dtype) for name, value in features.items()
    }
    mass = mass * 2e4  # sums to more than the largest half
    half = reduce(reduction_of(behaviour, 9), tokens.to(dtype), mass, rounded)
    single = {name: value if name == "grid" else value.float() for name, value in rounded.items()}
    full = reduce(reduction_of(behaviour, 9), tokens.to(dtype).float(), mass, single)
    assert half.tokens.dtype == dtype
    assert torch.equal(half.kept, full.kept)
    assert_close(full.tokens, half.tokens, 8)


def test_features_that_are_required_are_enough() -> None:
    tokens, mass, features = inputs(0)
    for behaviour in BEHAVIOURS | STATIC:
        reduction = reduction_of(behaviour, 9)
        needed = required_features(reduction) - {"tokens"}
        given_ = {name: features[name] for name in needed}
        reduce(reduction, tokens, mass, given_)
        for name in needed:
            fewer = {key: value for key, value in given_.items() if key != name}
            with pytest.raises(KeyError, match=name):
                reduce(reduction, tokens, mass, fewer)


# *** relaxed


def test_similarities_are_observed_where_the_first_tier_is() -> None:
    tier = Tier(keep=4, selector="max_min", observe="next")
    reduction = Reduction("projector", 8, tiers=(tier,), similarity={"key": 1})
    needed = required_features(reduction)
    assert needed == {"tokens", "attention_cls", "keys"}
    there = Reduction("projector", 8, tiers=(tier,), similarity={"key": 1}, observe="next")
    assert required_features(there) == {"tokens", "attention_cls@next", "keys@next"}


def test_a_copy_of_the_class_token_comes_first() -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction(
        "vision.2",
        12,
        keep_class=True,
        tiers=(Tier(keep=4, selector="strided"),),
        order="tier",
        receivers="last",
        gain=1,
        average=True,
        exponent=0,
        position="compact",
    )
    assert "class_token" in required_features(reduction)
    result = static_reduce(reduction, 12, tokens, mass, features)
    assert result.tokens.shape == (3, 12, WIDTH)
    assert torch.equal(result.tokens[:, :1], features["class_token"])
    assert torch.equal(result.kept[:, 0], torch.full((3,), -1))
    assert torch.equal(result.mass[:, 0], torch.ones(3))
    assert torch.equal(result.kept[:, 1:8], features["attention_cls"].topk(7).indices.sort().values)
    assert_close(result.mass[:, 1:].sum(-1), mass.sum(-1))
