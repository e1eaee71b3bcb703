"""Which tokens are chosen: every selector against a plain loop over one row."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import (
    SIDE,
    TEXT,
    TOKENS,
    WIDTH,
    cosine,
    counts,
    falling,
    gather,
    grid,
    inputs,
    quick,
    seeds,
)
from torch import Tensor
from torch.nn import functional as F

from deos_fx import operator
from deos_fx.operator.select import SELECTORS, WHOLE_NUMBERS
from deos_fx.operator.sequential import greedy_penalty, max_min_ranking


def _score(seed: int, rows: int = 3) -> Tensor:
    return inputs(seed, rows, torch.float64)[2]["attention_cls"]


def _taken(seed: int, count: int, rows: int = 3) -> Tensor:
    """Flags of so many tokens that other tiers have chosen."""
    noise = torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(seed + 1))
    flags = torch.zeros(rows, TOKENS, dtype=torch.float64)
    return flags.scatter(1, noise.topk(count).indices, 1.0)


def _free(taken: Tensor | None, row: int) -> list[int]:
    return [j for j in range(TOKENS) if taken is None or not taken[row, j]]


def _split(data: st.DataObject, seed: int) -> tuple[Tensor | None, int, int]:
    """What is taken, how many tokens that are, and how many are to be picked."""
    already = data.draw(st.integers(0, TOKENS - 1))
    count = data.draw(st.integers(1, TOKENS - already))
    return (_taken(seed, already) if already else None), already, count


@quick
@given(st.data(), seeds)
def test_top_k_leaves_what_is_taken(data: st.DataObject, seed: int) -> None:
    score = _score(seed)
    taken, _, count = _split(data, seed)
    kept = operator.top_k(score, taken, count)
    for row in range(3):
        assert kept[row].tolist() == falling(score[row], _free(taken, row))[:count]


@quick
@given(st.data(), seeds)
def test_greedy_holds_what_is_taken_against_the_others(data: st.DataObject, seed: int) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score = operator.standardize(features["attention_cls"])
    similarity = cosine(tokens)
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
    similarity = cosine(inputs(seed, dtype=torch.float64)[0])
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
@given(st.data(), seeds, st.integers(1, 5))
def test_several_picks_at_once_are_the_best_of_a_step(
    data: st.DataObject, seed: int, at_once: int
) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score = operator.standardize(features["attention_cls"])
    similarity = cosine(tokens)
    taken, already, count = _split(data, seed)
    kept = operator.greedy(score, similarity, taken, 0.8, count, at_once)
    for row in range(3):
        chosen = [] if taken is None else taken[row].nonzero().flatten().tolist()
        # The first is picked alone.
        number = 1
        while len(chosen) < already + count:
            held = {
                j: max((float(similarity[row, i, j]) for i in chosen), default=-1.0)
                for j in range(TOKENS)
                if j not in chosen
            }
            gains = {j: float(score[row, j]) - 0.8 * value for j, value in held.items()}
            number = min(number, already + count - len(chosen))
            chosen += sorted(gains, key=lambda j: -gains[j])[:number]
            number = at_once
        assert kept[row].tolist() == chosen[already:]


@quick
@given(seeds, counts)
def test_max_min_ranking_falls_in_the_order_of_the_picks(seed: int, count: int) -> None:
    similarity = cosine(inputs(seed, dtype=torch.float64)[0])
    ranking = max_min_ranking(similarity, count, torch.ones(3, TOKENS, dtype=torch.float64))
    kept = operator.max_min(similarity, None, count)
    assert torch.equal(operator.top_k(ranking, None, count), kept)


@quick
@given(st.data(), seeds)
def test_determinantal_is_greedy_by_log_determinant(data: st.DataObject, seed: int) -> None:
    _, _, features = inputs(seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    similarity = cosine(torch.randn(3, TOKENS, 64, generator=generator, dtype=torch.float64))
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
    similarity = cosine(torch.randn(2, TOKENS, 3))
    for score in (torch.rand(2, TOKENS), torch.full((2, TOKENS), 0.1)):
        kept = operator.determinantal(score, similarity, None, TOKENS)
        assert torch.equal(kept.sort(-1).values, torch.arange(TOKENS).expand(2, -1))


def test_beyond_the_rank_relevance_decides_and_rounding_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, score = torch.randn(2, TOKENS, 4, generator=generator), torch.rand(2, TOKENS)
    kept = operator.determinantal(score, cosine(vectors), None, 20)
    # The same cosines up to rounding, as a batch and a row alone have them.
    turned = vectors @ torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    assert torch.equal(kept, operator.determinantal(score, cosine(turned), None, 20))
    for row in range(2):
        first, later = kept[row, :4].tolist(), kept[row, 4:].tolist()
        others = [j for j in range(TOKENS) if j not in first]
        assert later == falling(score[row], others)[:16]


@quick
@given(st.data(), seeds, st.sampled_from([0.0, 0.5, 2.0]))
def test_coverage_gains_most_at_every_step(data: st.DataObject, seed: int, power: float) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score, similarity = features["attention_cls"], cosine(tokens)
    taken, _, count = _split(data, seed)
    count = min(count, 6)
    kept = operator.coverage(score, similarity, taken, count, power)
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    relevance = ((score - low + 1e-6) / (high - low)) ** power
    for row in range(3):
        free = _free(taken, row)
        chosen = [j for j in range(TOKENS) if j not in free]

        def covered(by: list[int], row: int = row) -> float:
            best = similarity[row][by].amax(0) if by else torch.zeros(TOKENS)
            return float(best.clamp_min(0).sum())

        for picked in kept[row].tolist():
            before = covered(chosen)
            gains = {
                j: float(relevance[row, j]) * (covered([*chosen, j]) - before)
                for j in free
                if j not in chosen
            }
            # Two tokens that cover each other gain the same.
            assert gains[picked] == pytest.approx(max(gains.values()), abs=1e-9)
            chosen.append(picked)


@quick
@given(st.data(), seeds, st.integers(1, 9))
def test_distinct_drops_near_duplicates_in_rounds(
    data: st.DataObject, seed: int, per_round: int
) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score, similarity = features["attention_cls"], cosine(tokens)
    taken, already, count = _split(data, seed)
    kept = operator.distinct(score, similarity, taken, already, count, per_round)
    for row in range(3):
        left = falling(score[row], _free(taken, row))
        while len(left) > count:
            even, odd = left[::2], left[1::2]
            like = {i: max(float(similarity[row, i, j]) for j in odd) for i in even}
            ranked = sorted(even, key=lambda i: -like[i])
            left = ranked[min(per_round, len(left) - count, len(even)) :] + odd
        assert kept[row].tolist() == left


@quick
@given(st.data(), seeds, st.integers(1, 4))
def test_distinct_in_a_loop_drops_the_same(data: st.DataObject, seed: int, per_round: int) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    taken, already, count = _split(data, seed)
    given_ = (features["attention_cls"], cosine(tokens), taken, already, count, per_round)
    plain = operator.distinct(*given_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        # As it is, a scan is compiled anew for each shape.
        patch.setattr("torch._higher_order_ops.scan", _scanned)
        assert torch.equal(operator.distinct(*given_), plain)


def _scanned(step: Any, held: torch.Tensor, given_: torch.Tensor) -> tuple[torch.Tensor, None]:
    for each in given_:
        held, _ = step(held, each)
    return held, None


@quick
@given(st.data(), seeds, st.integers(1, 4), st.integers(0, TEXT))
def test_probe_takes_the_least_similar_to_each_pivot(
    data: st.DataObject, seed: int, image_pivots: int, text_pivots: int
) -> None:
    _, _, features = inputs(seed, dtype=torch.float64)
    score, text_score = features["attention_cls"], features["text_score"]
    tokens, text = features["normed_tokens"], features["normed_text"]
    taken, _, count = _split(data, seed)
    # Rows have unequal numbers of words, as padded prompts do.
    words = [data.draw(st.integers(0, TEXT)) for _ in range(3)]
    said = torch.arange(TEXT) < torch.tensor(words)[:, None]
    text_score = torch.where(said, text_score, torch.finfo(text_score.dtype).min)
    kept = operator.probe(score, tokens, text_score, text, taken, count, image_pivots, text_pivots)
    for row in range(3):
        free = _free(taken, row)
        chosen = sorted(falling(score[row], free)[: min(image_pivots, count)])
        best = falling(text_score[row], [*range(words[row])])[:text_pivots]
        probes = [*tokens[row, chosen], *text[row, sorted(best)]]
        share, more = divmod(count - len(chosen), len(probes))
        for i, pivot in enumerate(probes):
            free = [j for j in free if j not in chosen]
            like = F.cosine_similarity(tokens[row], pivot, -1)
            chosen += falling(-like, free)[: share + (i < more)]
        assert kept[row].tolist() == chosen
    # There are no more pivots than text.
    more = operator.probe(score, tokens, text_score, text, taken, count, image_pivots, TEXT + 3)
    most = operator.probe(score, tokens, text_score, text, taken, count, image_pivots, TEXT)
    assert torch.equal(more, most)


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
        best = [j for members in cells.values() for j in falling(score[row], members)[:share]]
        assert kept[row].tolist() == falling(score[row], best)[:count]


@quick
@given(st.data(), seeds)
def test_windows_that_are_taken_leave_their_places(data: st.DataObject, seed: int) -> None:
    taken, _, count = _split(data, seed)
    members = operator.window_members(grid(), 9)
    kept = operator.windows(_score(seed), members, taken, count, 9)
    for row in range(3):
        assert len(set(kept[row].tolist())) == count
        assert set(kept[row].tolist()) <= set(_free(taken, row))


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
            chosen += run if wanted >= len(run) else falling(score[row], run)[:wanted]
        assert kept[row, : len(chosen)].tolist() == chosen
        left = [j for j in range(TOKENS) if j not in chosen]
        assert kept[row, len(chosen) :].tolist() == falling(score[row], left)[: count - len(chosen)]


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
    similarity = cosine(tokens)
    for row in range(3):
        like = {i: max(float(similarity[row, i, j]) for j in half_b) for i in half_a}
        merged = sorted(half_a, key=lambda i: -like[i])[: length - count]
        assert kept[row].tolist() == [i for i in half_a if i not in merged] + list(half_b)
    assert operator.second_half(kept, tokens, first)[0].tolist() == list(half_b)


@pytest.mark.parametrize("first", [0, 1])
def test_a_single_token_has_no_half_to_be_merged_into(first: int) -> None:
    tokens = torch.randn(2, 1, WIDTH)
    between = operator.between_halves({"feature": tokens}, {"feature": 1.0}, first)
    kept = operator.bipartite(between, 1, first)
    assert kept.tolist() == operator.second_half(kept, tokens, first).tolist() == [[0], [0]]


@quick
@given(seeds, counts, st.floats(0, 5))
def test_neighbourhood_flags_anchors_and_what_is_around(
    seed: int, count: int, share: float
) -> None:
    score = _score(seed)
    flags = operator.neighbourhood(score, SIDE, count, share)
    for row in range(3):
        anchors = falling(score[row], list(range(TOKENS)))[: round(count * share / 5)]
        near = {min(max(j + s, 0), 35) for j in anchors for s in (0, -1, 1, -SIDE, SIDE)}
        assert flags[row].nonzero().flatten().tolist() == sorted(near)


# *** half precision and order of the tokens


@quick
@given(seeds, st.integers(1, TOKENS))
def test_top_k_is_torch_topk(seed: int, count: int) -> None:
    score = inputs(seed)[2]["attention_last"]
    kept = operator.top_k(score, None, count)
    assert kept.shape == (3, count)
    assert torch.equal(gather(score, kept), score.topk(count).values)
    assert (operator.in_order(kept).diff(dim=-1) > 0).all()


@quick
@given(seeds, st.integers(1, TOKENS), st.floats(0, 5))
def test_greedy_is_a_plain_loop(seed: int, count: int, diversity: float) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score = operator.standardize(features["attention_last"])
    similarity = operator.similarity({"feature": tokens}, {"feature": 1.0})
    kept = operator.greedy(score, similarity, None, diversity, count)
    for row in range(3):
        chosen: list[int] = []
        while len(chosen) < count:
            gains = {
                j: score[row, j]
                - diversity * max((similarity[row, i, j] for i in chosen), default=-1)
                for j in range(TOKENS)
                if j not in chosen
            }
            chosen.append(max(gains, key=lambda j: gains[j]))
        assert kept[row].tolist() == chosen


@quick
@given(seeds, st.integers(1, TOKENS))
def test_greedy_without_diversity_is_top_k(seed: int, count: int) -> None:
    tokens, _, features = inputs(seed)
    score = features["attention_last"]
    similarity = operator.similarity({"feature": tokens}, {"feature": 1.0})
    kept = operator.greedy(score, similarity, None, 0.0, count)
    assert torch.equal(kept, operator.top_k(score, None, count))


@quick
@given(seeds, st.integers(1, TOKENS), st.floats(0, 5))
def test_greedy_penalty_ranks_like_greedy(seed: int, count: int, diversity: float) -> None:
    tokens, _, features = inputs(seed, dtype=torch.float64)
    score = operator.standardize(features["attention_last"])
    similarity = operator.similarity({"feature": tokens}, {"feature": 1.0})
    weight = torch.tensor(diversity, dtype=torch.float64)
    for steps in (count, TOKENS):
        gain = score - weight * greedy_penalty(score, similarity, steps, weight)
        kept = operator.greedy(score, similarity, None, diversity, count)
        best = operator.top_k(gain, None, count)
        assert torch.equal(operator.in_order(best), operator.in_order(kept))


@pytest.mark.parametrize("name", operator.SELECTORS)
def test_a_row_names_the_options_of_its_function(name: str) -> None:
    row = operator.SELECTORS[name]
    parameters = [*inspect.signature(row.function).parameters]
    # What it needs, the count, and the options.
    assert parameters[len(row.needs) + 1 :] == [*row.options]


def test_options_that_are_counts_are_whole_numbers() -> None:
    rows = [*operator.SELECTORS.values(), *operator.SCORES.values()]
    given = {name: value for row in rows for name, value in row.options.items()}
    assert WHOLE_NUMBERS.keys() == {x for x, value in given.items() if not isinstance(value, float)}
    for name, (least, most) in WHOLE_NUMBERS.items():
        assert given[name] is None or least <= given[name] < most
    # Which of two halves, a number that may be 0, any number, and counts.
    others = {"first": (0, 1), "text_pivots": (0, 1e6), "seed": (-1e9, 1e9)}
    assert dict.fromkeys(WHOLE_NUMBERS, (1, 1e6)) | others == WHOLE_NUMBERS


@pytest.mark.parametrize("name", [x for x, row in SELECTORS.items() if "taken" in row.needs])
def test_what_is_taken_is_left_where_all_tokens_are_alike(name: str) -> None:
    row, taken = SELECTORS[name], torch.zeros(2, TOKENS)
    taken[0, :6], taken[1, 30:] = 1, 1
    alike = {
        "score": torch.ones(2, TOKENS),
        "similarity": torch.ones(2, TOKENS, TOKENS),
        "taken": taken,
        "already": 6,
        "diversity": 1.0,
        "members": operator.window_members(grid(), 9),
        "tokens": torch.ones(2, TOKENS, WIDTH),
        "normed_tokens": torch.ones(2, TOKENS, WIDTH),
        "text_score": torch.ones(2, TEXT),
        "normed_text": torch.ones(2, TEXT, WIDTH),
    }
    options = [3 if value is None else value for value in row.options.values()]
    kept = row.function(*(alike[need] for need in row.needs), TOKENS - 6, *options)
    for picks, of_row in zip(kept, taken, strict=True):
        assert sorted(picks.tolist()) == (of_row == 0).nonzero().flatten().tolist()


@quick
@given(st.data(), seeds)
def test_an_export_picks_the_same(data: st.DataObject, seed: int) -> None:
    _, _, features = inputs(seed, dtype=torch.float64)
    taken, _, count = _split(data, seed)
    score = _score(seed)
    probe = [features[name] for name in ("normed_tokens", "text_score", "normed_text")]
    calls = {
        "top_k": lambda: operator.top_k(score, taken, count),
        "probe": lambda: operator.probe(score, *probe, taken, count, 2, 3),
        "quota": lambda: operator.quota(score, taken, count, 4),
    }
    plain = {name: call() for name, call in calls.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        for name, call in calls.items():
            assert torch.equal(call(), plain[name]), name
