"""Which tokens a reduction chooses: flags, tiers, and the order of what is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import SIDE, TOKENS, cosine, counts, falling, gather, inputs, quick, seeds
from torch import Tensor

from deos_fx import operator
from deos_fx.forms.static import StaticOutput, static_reduce
from deos_fx.operator import SELECTORS
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier


@pytest.mark.parametrize("selector", ["greedy", "max_min"])
def test_several_picks_at_once(selector: str) -> None:
    tokens, mass, features = inputs(0)
    for at_once in (1, 3, 50):
        options = {"options": {"at_once": at_once}}
        kept = static_reduce(
            Reduction("projector", 20, selector=selector, **options), 20, tokens, mass, features
        ).kept
        assert (kept.diff(dim=-1) > 0).all()
    # All but the first by the same gains.
    similarity = cosine(tokens)
    kept = operator.max_min(similarity, None, 7, at_once=6)
    for row in range(3):
        first = int(kept[row, 0])
        rest = [j for j in range(TOKENS) if j != first]
        assert kept[row, 1:].tolist() == falling(-similarity[row, first], rest)[:6]


def test_bipartite_keeps_half() -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction("projector", 17, selector="bipartite", gain=1)
    with pytest.raises(ValueError, match="keeps 17 of 36 tokens, .* keep at least 18"):
        static_reduce(reduction, 17, tokens, mass, features)


@quick
@given(seeds, counts)
def test_what_is_flagged_is_chosen_first(seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed)
    reduction = Reduction(
        "projector",
        count,
        selector="neighbourhood",
        options={"share": 1.0},
        tiers=(Tier(keep=1.0, scores={"key_norm": 1}),),
    )
    kept = static_reduce(reduction, count, tokens, mass, features).kept
    flags = operator.neighbourhood(features["attention_cls"], SIDE, count, 1.0)
    score = features["keys"].norm(dim=-1)
    for row in range(3):
        near = [j for j in range(TOKENS) if flags[row, j]]
        rest = [j for j in range(TOKENS) if not flags[row, j]]
        expected = (falling(score[row], near) + falling(score[row], rest))[:count]
        assert kept[row].tolist() == sorted(expected)


_TIERS: dict[str, dict[str, Any]] = {
    "greedy": {"diversity": 0.5},
    "lattice": {"options": {"step": 5}},
    "quota": {"options": {"windows": 4}},
    "windows": {"options": {"windows": 9}},
}


_FIRST = [name for name, row in SELECTORS.items() if not row.flags]


_LATER = [name for name, row in SELECTORS.items() if "taken" in row.needs]


def _tiered(
    first: str, later: list[str], keep: int, sizes: list[int], **fields: Any
) -> tuple[Reduction, StaticOutput]:
    tiers = tuple(
        Tier(keep=size, selector=name, **_TIERS.get(name, {}))
        for name, size in zip(later, sizes, strict=True)
    )
    fields = _TIERS.get(first, {}) | fields
    reduction = Reduction("projector", keep, selector=first, tiers=tiers, **fields)
    tokens, mass, features = inputs(0)
    return reduction, static_reduce(reduction, keep, tokens, mass, features)


@pytest.mark.parametrize("second", _LATER)
@pytest.mark.parametrize("first", [name for name in _FIRST if name != "bipartite"])
def test_no_token_is_chosen_twice(first: str, second: str) -> None:
    for order in ("position", "tier", "selection"):
        _, result = _tiered(first, [second], 13, [4], order=order, position="compact")
        alone = static_reduce(
            Reduction("projector", 9, selector=first, **_TIERS.get(first, {})), 9, *inputs(0)
        ).kept
        for row in range(3):
            kept = result.kept[row].tolist()
            assert len(set(kept)) == len(kept) == 13
            assert set(alone[row].tolist()) < set(kept)
            if order == "position":
                assert kept == sorted(kept)
            else:
                assert set(kept[:9]) == set(alone[row].tolist())
            if order == "tier":
                assert kept == sorted(kept[:9]) + sorted(kept[9:])


@quick
@given(st.sampled_from(_LATER), st.sampled_from(_LATER), st.data())
def test_counts_of_tiers(second: str, third: str, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))]
    keep = sum(sizes) + data.draw(st.integers(1, 18))
    reduction, result = _tiered("top_k", [second, third], keep, sizes)
    assert reduction.tier_counts(keep) == [keep - sum(sizes), *sizes]
    assert all(len(set(row)) == keep for row in result.kept.tolist())


def test_a_tier_that_gets_none_of_few_tokens_is_left_out() -> None:
    tokens, mass, features = inputs(0)
    tier = Tier(keep=0.2, selector="max_min")
    both = Reduction("projector", 0.05, tiers=(tier,), receivers="last", gain=1)
    result = static_reduce(both, 1, tokens, mass, features)
    alone = static_reduce(Reduction("projector", 1, gain=1), 1, tokens, mass, features)
    assert torch.equal(result.tokens, alone.tokens) and torch.equal(result.mass, alone.mass)
    assert torch.equal(result.kept, features["attention_cls"].topk(1).indices)


def test_order_of_selection_is_that_of_the_picks() -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction("projector", 9, order="selection", position="compact", gain=1)
    result = static_reduce(reduction, 9, tokens, mass, features)
    assert torch.equal(result.kept, features["attention_cls"].topk(9).indices)
    in_order = static_reduce(Reduction("projector", 9, gain=1), 9, tokens, mass, features)
    assert torch.equal(result.kept.sort(-1).values, in_order.kept)
    back = result.kept.argsort(-1)
    assert_close(gather(result.tokens, back), in_order.tokens)
    assert_close(gather(result.mass, back), in_order.mass)


@pytest.mark.parametrize("order", ["position", "tier", "selection"])
def test_only_the_last_tier_receives(order: str) -> None:
    tokens, mass, features = inputs(0)
    fields: dict[str, Any] = {"order": order, "position": "compact", "gain": 1}
    tier = Tier(keep=4, selector="max_min")
    reduction = Reduction("projector", 12, tiers=(tier,), receivers="last", **fields)
    result = static_reduce(reduction, 12, tokens, mass, features)
    first = features["attention_cls"].topk(8).indices
    for row in range(3):
        for slot, j in enumerate(result.kept[row].tolist()):
            if j in first[row]:
                assert torch.equal(result.tokens[row, slot], tokens[row, j])
                assert result.mass[row, slot] == mass[row, j]
            else:
                assert result.mass[row, slot] > mass[row, j]
    assert_close(result.mass.sum(-1), mass.sum(-1))


def test_tiers_may_observe_other_blocks() -> None:
    tokens, mass, features = inputs(0)
    tier = Tier(keep=4, scores={"mutual_attention": 1}, observe="next")
    reduction = Reduction(
        "projector", 8, scores={"mutual_attention": 1}, observe="vision.1", tiers=(tier,)
    )
    kept = static_reduce(reduction, 8, tokens, mass, features).kept
    for row in range(3):
        early, late = (features[f"attention_mutual@{where}"][row] for where in ("vision.1", "next"))
        chosen = falling(early, list(range(TOKENS)))[:4]
        chosen += falling(late, [j for j in range(TOKENS) if j not in chosen])[:4]
        assert kept[row].tolist() == sorted(chosen)


_EVERY: dict[str, dict[str, Any]] = {name: _TIERS.get(name, {}) for name in _FIRST}


@pytest.mark.parametrize("selector", _FIRST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selectors_in_half_precision(selector: str, dtype: torch.dtype) -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction("projector", 18, selector=selector, **_EVERY[selector])

    def kept(change: Callable[[Tensor], Tensor]) -> Tensor:
        values = {k: v if k == "grid" else change(v) for k, v in features.items()}
        return static_reduce(reduction, 18, change(tokens), mass, values).kept

    assert torch.equal(kept(lambda v: v.to(dtype)), kept(lambda v: v.to(dtype).float()))


@pytest.mark.parametrize("selector", ["top_k", "greedy", "max_min", "determinantal", "probe"])
@quick
@given(seed=seeds)
def test_selectors_by_content_ignore_the_order_of_the_tokens(selector: str, seed: int) -> None:
    tokens, mass, features = inputs(seed, dtype=torch.float64)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    fields = {"order": "selection", "position": "compact"} | _EVERY[selector]
    reduction = Reduction("projector", 7, selector=selector, **fields)
    moved = {
        name: value if value.shape[1] != TOKENS else value[:, order]
        for name, value in features.items()
        if name != "grid"
    }
    plain = static_reduce(reduction, 7, tokens, mass, features).kept
    again = static_reduce(reduction, 7, tokens[:, order], mass[:, order], moved).kept
    if selector == "probe":  # Its pivots act in the order of the image.
        assert {int(order[j]) for j in again[0, :4]} == set(plain[0, :4].tolist())
    else:
        # The two tokens of the farthest pair are equally isolated: max_min may begin with either.
        same = order[again][:, 0] == plain[:, 0]
        assert same.all() or selector == "max_min"
        assert torch.equal(order[again][same], plain[same])
