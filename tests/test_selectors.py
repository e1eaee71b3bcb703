"""Which tokens are chosen: every selector against a plain loop over one row, and tiers of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from site_inputs import SIDE, TEXT, TOKENS, WIDTH, gather, grid, inputs
from torch import Tensor
from torch.nn import functional as F

from deos_fx import operator
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import (
    StaticOutput,
    static_reduce,
)
from deos_fx.operator import SELECTORS
from deos_fx.operator.sequential import max_min_ranking
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

quick = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 2**31)
counts = st.integers(1, TOKENS)


def _cosine(x: Tensor) -> Tensor:
    return operator.similarity({"feature": x}, {"feature": 1.0})


def _score(seed: int, rows: int = 3) -> Tensor:
    return inputs(seed, rows, torch.float64)[2]["attention_cls"]


def _taken(seed: int, count: int, rows: int = 3) -> Tensor:
    """Flags of so many tokens that other tiers have chosen."""
    noise = torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(seed + 1))
    flags = torch.zeros(rows, TOKENS, dtype=torch.float64)
    return flags.scatter(1, noise.topk(count).indices, 1.0)


def _falling(values: Tensor, among: list[int]) -> list[int]:
    return sorted(among, key=lambda j: -float(values[j]))


def _free(taken: Tensor | None, row: int) -> list[int]:
    return [j for j in range(TOKENS) if taken is None or not taken[row, j]]


def _split(data: st.DataObject, seed: int) -> tuple[Tensor | None, int, int]:
    """What is taken, how many tokens that are, and how many are to be picked."""
    already = data.draw(st.integers(0, TOKENS - 1))
    count = data.draw(st.integers(1, TOKENS - already))
    return (_taken(seed, already) if already else None), already, count


# *** one selector at a time


@quick
@given(st.data(), seeds)
def test_top_k_leaves_what_is_taken(data: st.DataObject, seed: int) -> None:
    score = _score(seed)
    taken, _, count = _split(data, seed)
    kept = operator.top_k(score, taken, count)
    for row in range(3):
        assert kept[row].tolist() == _falling(score[row], _free(taken, row))[:count]


@quick
@given(st.data(), seeds)
def test_greedy_holds_what_is_taken_against_the_others(data: st.DataObject, seed: int) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score = operator.standardize(features["attention_cls"])
    similarity = _cosine(tokens)
    taken, already, count = _split(data, seed)
    kept = operator.greedy(score, similarity, taken, 0.8, count)
    for row in range(3):
        chosen = [] if taken is None else taken[row].nonzero().flatten().tolist()
        for _ in range(count):
            free = [j for j in range(TOKENS) if j not in chosen]
            held = {j: max((similarity[row, i, j] for i in chosen), default=-1.0) for j in free}
            chosen.append(max(free, key=lambda j: float(score[row, j] - 0.8 * held[j])))
        assert kept[row].tolist() == chosen[already:]


@quick
@given(st.data(), seeds)
def test_max_min_is_farthest_point_sampling(data: st.DataObject, seed: int) -> None:
    similarity = _cosine(inputs(seed, dtype=torch.float64)[0])
    taken, already, count = _split(data, seed)
    kept = operator.max_min(similarity, taken, count)
    for row in range(3):
        chosen = [] if taken is None else taken[row].nonzero().flatten().tolist()
        for _ in range(count):
            free = [j for j in range(TOKENS) if j not in chosen]
            others = chosen or range(TOKENS)
            nearest = {j: max(float(similarity[row, i, j]) for i in others if i != j) for j in free}
            chosen.append(min(free, key=lambda j: nearest[j]))
        assert kept[row].tolist() == chosen[already:]


@quick
@given(seeds, counts)
def test_max_min_ranking_falls_in_the_order_of_the_picks(seed: int, count: int) -> None:
    similarity = _cosine(inputs(seed, dtype=torch.float64)[0])
    ranking = max_min_ranking(similarity, count, torch.ones(3, TOKENS, dtype=torch.float64))
    kept = operator.max_min(similarity, None, count)
    assert torch.equal(operator.top_k(ranking, None, count), kept)


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
    similarity = _cosine(tokens)
    kept = operator.max_min(similarity, None, 7, at_once=6)
    for row in range(3):
        first = int(kept[row, 0])
        rest = [j for j in range(TOKENS) if j != first]
        assert kept[row, 1:].tolist() == _falling(-similarity[row, first], rest)[:6]


@quick
@given(st.data(), seeds)
def test_determinantal_is_greedy_by_log_determinant(data: st.DataObject, seed: int) -> None:
    _, _, features = inputs(seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    similarity = _cosine(torch.randn(3, TOKENS, 64, generator=generator, dtype=torch.float64))
    score = features["attention_text"]
    taken, _, count = _split(data, seed)
    count = min(count, 5)
    kept = operator.determinantal(score, similarity, taken, count)
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    relevance = (score - low + 1e-6) / (high - low)
    kernel = relevance.unsqueeze(-1) * similarity * relevance.unsqueeze(-2)
    for row in range(3):
        chosen: list[int] = []
        for _ in range(count):
            free = [j for j in _free(taken, row) if j not in chosen]
            sets = {j: kernel[row][[*chosen, j]][:, [*chosen, j]] for j in free}
            chosen.append(max(free, key=lambda j: float(torch.logdet(sets[j]))))
        assert kept[row].tolist() == chosen


def test_determinantal_beyond_the_rank_and_without_relevance() -> None:
    similarity = _cosine(torch.randn(2, TOKENS, 3))
    for score in (torch.rand(2, TOKENS), torch.full((2, TOKENS), 0.1)):
        kept = operator.determinantal(score, similarity, None, TOKENS)
        assert torch.equal(kept.sort(-1).values, torch.arange(TOKENS).expand(2, -1))


@quick
@given(st.data(), seeds, st.integers(1, 9))
def test_distinct_drops_near_duplicates_in_rounds(
    data: st.DataObject, seed: int, per_round: int
) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score, similarity = features["attention_cls"], _cosine(tokens)
    taken, already, count = _split(data, seed)
    kept = operator.distinct(score, similarity, taken, already, count, per_round)
    for row in range(3):
        left = _falling(score[row], _free(taken, row))
        while len(left) > count:
            even, odd = left[::2], left[1::2]
            like = {i: max(float(similarity[row, i, j]) for j in odd) for i in even}
            ranked = sorted(even, key=lambda i: -like[i])
            left = ranked[min(per_round, len(left) - count, len(even)) :] + odd
        assert kept[row].tolist() == left


@quick
@given(st.data(), seeds, st.integers(1, 4), st.integers(0, 4))
def test_probe_takes_the_least_similar_to_each_pivot(
    data: st.DataObject, seed: int, image_pivots: int, text_pivots: int
) -> None:
    _, _, features = inputs(seed, dtype=torch.float64)
    score, text_score = features["attention_cls"], features["text_score"]
    tokens, text = features["normed_tokens"], features["normed_text"]
    taken, _, count = _split(data, seed)
    kept = operator.probe(score, tokens, text_score, text, taken, count, image_pivots, text_pivots)
    for row in range(3):
        free = _free(taken, row)
        chosen = sorted(_falling(score[row], free)[: min(image_pivots, count)])
        best = sorted(range(TEXT), key=lambda t: -float(text_score[row, t]))[:text_pivots]
        probes = [*tokens[row, chosen], *text[row, sorted(best)]]
        share, more = divmod(count - len(chosen), len(probes))
        for i, pivot in enumerate(probes):
            free = [j for j in free if j not in chosen]
            like = F.cosine_similarity(tokens[row], pivot, -1)
            chosen += _falling(-like, free)[: share + (i < more)]
        assert kept[row].tolist() == chosen


@quick
@given(st.data(), seeds)
def test_strided_takes_every_step_th_of_what_is_left(data: st.DataObject, seed: int) -> None:
    taken, already, count = _split(data, seed)
    kept = operator.strided(torch.empty(3, TOKENS, WIDTH), taken, already, count)
    for row in range(3):
        left = _free(taken, row)
        step = max(1, len(left) // count)
        assert kept[row].tolist() == left[::step][:count]


@quick
@given(st.data(), seeds, st.integers(1, 40))
def test_lattice_takes_multiples_of_the_step(data: st.DataObject, seed: int, step: int) -> None:
    taken, _, count = _split(data, seed)
    kept = operator.lattice(torch.empty(3, TOKENS, WIDTH), taken, count, step)
    for row in range(3):
        free = _free(taken, row)
        multiples = [j for j in range(0, TOKENS - 1, step) if j in free]
        assert kept[row].tolist() == (multiples + [j for j in free if j not in multiples])[:count]


@quick
@given(st.data(), seeds, st.sampled_from([1, 4, 9, 18]), st.integers(1, 2))
def test_windows_give_their_best(data: st.DataObject, seed: int, windows: int, images: int) -> None:
    places = grid(6) if images == 1 else grid(6, 2)[torch.arange(72) % 36 < 36]
    length = len(places)
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(2, length, generator=generator, dtype=torch.float64)
    count = data.draw(st.integers(1, length))
    kept = operator.windows(score, operator.window_members(places, windows), None, count, windows)
    down, across = operator.grid_layout(6, 6, windows)
    cells: dict[tuple[int, ...], list[int]] = {}
    for j, (image, row, column) in enumerate(places.tolist()):
        cell = (image, row * down // 6, column * across // 6)
        cells.setdefault(cell, []).append(j)
    assert len(cells) == windows * images
    share = -(-count // len(cells))
    for row in range(2):
        best = [j for members in cells.values() for j in _falling(score[row], members)[:share]]
        assert kept[row].tolist() == _falling(score[row], best)[:count]


@quick
@given(st.data(), seeds)
def test_windows_that_are_taken_leave_their_places(data: st.DataObject, seed: int) -> None:
    taken, _, count = _split(data, seed)
    members = operator.window_members(grid(), 9)
    kept = operator.windows(_score(seed), members, taken, count, 9)
    for row in range(3):
        assert len(set(kept[row].tolist())) == count
        assert set(kept[row].tolist()) <= set(_free(taken, row))


def test_windows_must_be_equal() -> None:
    with pytest.raises(ValueError, match="8 windows do not split a grid of 6 x 6 tokens evenly"):
        operator.window_members(grid(), 8)
    with pytest.raises(ValueError, match="windows need complete grids, but 35 tokens"):
        operator.window_members(grid()[1:], 4)


@quick
@given(seeds, counts, st.integers(1, TOKENS))
def test_quota_gives_places_by_mean_score(seed: int, count: int, windows: int) -> None:
    score = _score(seed)
    kept = operator.quota(score, None, count, windows)
    size, longer = divmod(TOKENS, windows)
    ends = [i * size + min(i, longer) for i in range(windows + 1)]
    runs = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    for row in range(3):
        means = [float(score[row, run].mean()) for run in runs]
        shares = [mean / (sum(means) + 1e-6) for mean in means]
        places = [math.floor(share * count) for share in shares]
        for i in sorted(range(windows), key=lambda i: -shares[i])[: count - sum(places)]:
            places[i] += 1
        chosen: list[int] = []
        for run, wanted in zip(runs, places, strict=True):
            chosen += run if wanted >= len(run) else _falling(score[row], run)[:wanted]
        assert kept[row, : len(chosen)].tolist() == chosen
        left = [j for j in range(TOKENS) if j not in chosen]
        assert (
            kept[row, len(chosen) :].tolist() == _falling(score[row], left)[: count - len(chosen)]
        )


@quick
@given(st.data(), seeds)
def test_quota_leaves_what_is_taken(data: st.DataObject, seed: int) -> None:
    taken, _, count = _split(data, seed)
    kept = operator.quota(_score(seed), taken, count, 5)
    for row in range(3):
        assert len(set(kept[row].tolist())) == count
        assert set(kept[row].tolist()) <= set(_free(taken, row))


@quick
@given(st.data(), seeds, st.sampled_from([0, 1]), st.sampled_from([36, 35]))
def test_bipartite_merges_half_of_the_tokens(
    data: st.DataObject, seed: int, first: int, length: int
) -> None:
    tokens = inputs(seed, dtype=torch.float64)[0][:, :length]
    half_a, half_b = range(first, length, 2), range(1 - first, length, 2)
    count = data.draw(st.integers(len(half_b), length))
    between = operator.between_halves({"feature": tokens}, {"feature": 1.0}, first)
    kept = operator.bipartite(between, count, first)
    similarity = _cosine(tokens)
    for row in range(3):
        like = {i: max(float(similarity[row, i, j]) for j in half_b) for i in half_a}
        merged = sorted(half_a, key=lambda i: -like[i])[: length - count]
        assert kept[row].tolist() == [i for i in half_a if i not in merged] + list(half_b)
    assert operator.second_half(kept, tokens, first)[0].tolist() == list(half_b)


def test_bipartite_keeps_half() -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction("projector", 17, selector="bipartite", gain=1)
    with pytest.raises(ValueError, match="keeps 17 of 36 tokens, .* keep at least 18"):
        static_reduce(reduction, 17, tokens, mass, features)


@quick
@given(seeds, counts, st.floats(0, 5))
def test_neighbourhood_flags_anchors_and_what_is_around(
    seed: int, count: int, share: float
) -> None:
    score = _score(seed)
    flags = operator.neighbourhood(score, SIDE, count, share)
    for row in range(3):
        anchors = _falling(score[row], list(range(TOKENS)))[: round(count * share / 5)]
        near = {min(max(j + s, 0), 35) for j in anchors for s in (0, -1, 1, -SIDE, SIDE)}
        assert flags[row].nonzero().flatten().tolist() == sorted(near)


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
        expected = (_falling(score[row], near) + _falling(score[row], rest))[:count]
        assert kept[row].tolist() == sorted(expected)


# *** tiers

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
        chosen = _falling(early, list(range(TOKENS)))[:4]
        chosen += _falling(late, [j for j in range(TOKENS) if j not in chosen])[:4]
        assert kept[row].tolist() == sorted(chosen)


def test_similarities_are_observed_where_the_first_tier_is() -> None:
    tier = Tier(keep=4, selector="max_min", observe="next")
    reduction = Reduction("projector", 8, tiers=(tier,), similarity={"key": 1})
    needed = required_features(reduction)
    assert needed == {"tokens", "attention_cls", "keys"}
    there = Reduction("projector", 8, tiers=(tier,), similarity={"key": 1}, observe="next")
    assert required_features(there) == {"tokens", "attention_cls@next", "keys@next"}


# *** transfers that need a loop of their own


def _one_row(reduction: Reduction, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
    tokens, mass, features = inputs(4, 1, torch.float64)
    result = static_reduce(reduction, count, tokens, mass, features)
    return tokens[0], mass[0], {name: value[0] for name, value in features.items()}, result


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gain", [0.4, 1.0])
def test_neighbours_and_the_rest_are_a_plain_loop(residual: bool, gain: float) -> None:
    reduction = Reduction(
        "projector",
        7,
        gain=gain,
        assignment="k_nearest",
        neighbours=5,
        similarity={"joint_key": 1},
        weighting="raw",
        exponent=0,
        residual=residual,
        order="selection",
        position="compact",
    )
    x, _, features, result = _one_row(reduction, 7)
    a, keys = features["attention_cls"], features["joint_keys"]
    kept = _falling(a, list(range(TOKENS)))[:7]
    assert result.kept[0].tolist() == kept
    for slot, i in enumerate(kept):
        if residual and i == kept[-1]:
            expected = sum(a[j] * x[j] for j in range(TOKENS) if j not in kept[:-1])
        else:
            like = {
                j: float(F.cosine_similarity(keys[i], keys[j], 0)) for j in range(TOKENS) if j != i
            }
            near = sorted(like, key=lambda j: -like[j])[:5]
            expected = x[i] + gain * sum(a[j] * x[j] for j in near)
        assert_close(result.tokens[0, slot], expected)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_average_is_a_plain_loop(exponent: float) -> None:
    reduction = Reduction(
        "projector",
        12,
        gain=0.5,
        tiers=(Tier(keep=4, selector="strided"),),
        receivers="last",
        average=True,
        exponent=exponent,
        order="tier",
        position="compact",
    )
    x, mass, _, result = _one_row(reduction, 12)
    kept = result.kept[0].tolist()
    received: dict[int, list[int]] = {i: [] for i in kept[8:]}
    for j in set(range(TOKENS)) - set(kept):
        like = [float(F.cosine_similarity(x[i], x[j], 0)) for i in kept[8:]]
        received[kept[8 + like.index(max(like))]].append(j)
    for slot, i in enumerate(kept):
        expected = x[i]
        if received.get(i):
            weights = mass[received[i]]
            mean = (weights.unsqueeze(-1) * x[received[i]]).sum(0) / weights.sum()
            expected = (x[i] + 0.5 * mean) / 1.5**exponent
        assert_close(result.tokens[0, slot], expected)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    ("side", "count"), [(6, 9), (6, 4), (6, 16), (6, 25), (7, 9), (7, 16), (5, 25), (6, 1), (8, 6)]
)
def test_windows_interpolate_like_torch(side: int, count: int, images: int) -> None:
    tokens = torch.randn(2, images * side**2, WIDTH, dtype=torch.float64)
    reduction = Reduction("projector", count * images, selector="grid", assignment="window", gain=1)
    places = {"grid": grid(side, images)}
    result = static_reduce(reduction, count * images, tokens, None, places)
    size = operator.grid_layout(side, side, count)
    planes = tokens.view(2 * images, side, side, WIDTH).movedim(-1, 1)
    expected = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    expected = expected.movedim(1, -1).reshape(2, images * count, WIDTH)
    # Shares of windows are constants in single precision.
    assert_close(result.tokens.float(), expected.float())


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


def test_raw_scores_stand_in_place_of_masses() -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction("projector", 6, residual=True, weighting="raw", exponent=0)
    with_masses = static_reduce(reduction, 6, tokens, mass, features)
    without = static_reduce(reduction, 6, tokens, None, features)
    assert torch.equal(with_masses.tokens, without.tokens)
    assert_close(with_masses.mass.sum(-1), mass.sum(-1))


# *** half precision and order of the tokens

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
