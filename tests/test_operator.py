"""The operator: properties, independent oracles, and relaxed against static."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close, assert_onnx_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from site_inputs import SIDE, TOKENS, WIDTH, gather, grid, inputs
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from deos_fx import operator
from deos_fx.forms.needs import required_features
from deos_fx.forms.relaxed import RelaxedReduction, has_relaxed_form
from deos_fx.forms.soft_top_k import soft_top_k
from deos_fx.forms.static import (
    StaticOutput,
    static_reduce,
)
from deos_fx.operator import (
    SCORES,
    SELECTORS,
)
from deos_fx.operator.grid import grid_preference
from deos_fx.operator.sequential import greedy_penalty
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

quick = settings(deadline=None, max_examples=10)
seeds = st.integers(0, 2**31)
PROBE = {"probe": (0.5, -1.0, 2.0, 0.25, -0.75, 1.0, 0.0, 3.0)}

# One of every regime and selector, and mixtures of them.
BEHAVIOURS: dict[str, dict[str, Any]] = {
    "prune": {},
    "prune by a mixture": {"scores": {"novelty": 1, "key_norm": 2, "text_attention": 1}},
    "merge": {"gain": 1},
    "merge half by keys": {"gain": 0.5, "similarity": {"key": 1, "feature": 1}},
    "sum": {"gain": 1, "exponent": 0, "weighting": "score"},
    "pool": {"gain": 1, "selector": "grid", "similarity": {"grid": 1}},
    "soft grid": {"gain": 1, "selector": "grid", "similarity": {"grid": 1}, "temperature": 0.05},
    "grid prune": {"selector": "grid", "reweight": 0.2},
    "uniform": {"gain": 1, "temperature": math.inf},
    "redistribute": {"gain": 1, "temperature": 0.1},
    "reweight": {"reweight": 0.3},
    "greedy": {"selector": "greedy", "diversity": 0.7},
    "greedy merge": {"selector": "greedy", "diversity": 2.0, "gain": 1, "temperature": 0.2},
    "residual": {"residual": True},
    "residual by score": {"residual": True, "gain": 0.3, "weighting": "score", "exponent": 0},
    "residual without rest": {"residual": True, "gain": 1, "weighting": "score"},
    "max_min": {"selector": "max_min"},
    "max_min merge": {"selector": "max_min", "gain": 1, "similarity": {"key": 1, "feature": 2}},
    "by place": {"scores": {"random": 1}, "options": {"seed": 3}, "gain": 1, "weighting": "score"},
    "greedy by place": {
        "scores": {"grid_coverage": 1, "random": 1},
        "selector": "greedy",
        "diversity": 1.0,
        "similarity": {"key": 1},
    },
    "every score": {"scores": {name: 1 for name in SCORES}, "options": PROBE},
    "everything": {
        "selector": "greedy",
        "diversity": 0.3,
        "gain": 0.4,
        "temperature": 0.07,
        "similarity": {"feature": 1, "key": 1, "grid": 1},
        "weighting": "score",
        "exponent": 0.6,
        "reweight": -0.1,
        "residual": True,
    },
}
_AS_CHOSEN = {"order": "selection", "position": "compact"}

# Those without a relaxed form.
STATIC: dict[str, dict[str, Any]] = {
    "greedy in steps": {"selector": "greedy", "diversity": 0.7, "options": {"at_once": 3}},
    "max_min in steps": {"selector": "max_min", "options": {"at_once": 3}, "gain": 1},
    "determinantal": {
        "selector": "determinantal",
        "scores": {"text_relevance": 1},
        "similarity": {"feature": 1, "grid": 1},
    },
    "distinct": {"tiers": (Tier(keep=0.5, selector="distinct", options={"per_round": 7}),)},
    "probe": {
        "selector": "probe",
        "scores": {"key_l1_norm": 1},
        "options": {"image_pivots": 2, "text_pivots": 3},
    },
    "windows": {"selector": "windows", "options": {"windows": 9}, "gain": 1},
    "windows after": {
        "tiers": (
            Tier(keep=0.5, selector="windows", scores={"novelty": 1}, options={"windows": 4}),
        ),
    },
    "quota": {"selector": "quota", "options": {"windows": 5}, **_AS_CHOSEN},
    "quota of a mixture": {
        "selector": "quota",
        "scores": {"novelty": 1, "key_norm": 1},
        "options": {"windows": 4},
        "reweight": 0.1,
    },
    "bipartite": {
        "selector": "bipartite",
        "options": {"first": 1},
        "similarity": {"key": 1},
        "gain": 1,
        "receivers": "last",
        **_AS_CHOSEN,
    },
    "bipartite sorted": {"selector": "bipartite", "gain": 1, "receivers": "last"},
    "neighbourhood": {
        "selector": "neighbourhood",
        "scores": {"mutual_attention": 1},
        "observe": "vision.1",
        "options": {"share": 1.5},
        "tiers": (Tier(keep=1.0, scores={"mutual_attention": 1}, observe="next"),),
    },
    "contextual": {
        "tiers": (Tier(keep=0.25, selector="strided"),),
        "order": "tier",
        "position": "compact",
        "receivers": "last",
        "gain": 1,
        "similarity": {"key": 1},
        "average": True,
        "exponent": 0,
    },
    "contextual sorted": {
        "tiers": (Tier(keep=0.25, selector="strided"),),
        "receivers": "last",
        "gain": 1,
        "average": True,
    },
    "neighbours": {"gain": 1, "assignment": "k_nearest", "neighbours": 5},
    "neighbours and rest": {
        "tiers": (Tier(keep=0.5, selector="lattice", options={"step": 3}),),
        "gain": 0.5,
        "assignment": "k_nearest",
        "neighbours": 5,
        "similarity": {"joint_key": 1},
        "weighting": "raw",
        "exponent": 0,
        "residual": True,
        **_AS_CHOSEN,
    },
    "fused by attention": {"residual": True, "weighting": "raw", "exponent": 0, **_AS_CHOSEN},
    "rest into the last tier": {
        "tiers": (Tier(keep=0.25, selector="max_min"),),
        "receivers": "last",
        "gain": 0.5,
        "residual": True,
    },
    "interpolate": {"selector": "grid", "assignment": "window", "gain": 1},
    "grid and best": {"selector": "grid", "tiers": (Tier(keep=0.5),), "gain": 1},
    "three tiers": {
        "scores": {"random": 1},
        "tiers": (
            Tier(keep=0.25, selector="greedy", diversity=0.5, scores={"novelty": 1}),
            Tier(keep=0.25, scores={"key_norm": 1, "novelty": 1}, observe="next"),
        ),
        "gain": 1,
        "temperature": 0.3,
        "order": "tier",
        "position": "compact",
    },
}
LEAST = {"bipartite": TOKENS // 2, "bipartite sorted": TOKENS // 2}
LEAST |= {name: 4 for name, fields in STATIC.items() if "tiers" in fields}
COUNTS = [1, 4, 9, 18, 36]
WITH_CLASS_TOKEN = Reduction("vision.1", 5, keep_class=True, **_AS_CHOSEN)
behaviours = pytest.mark.parametrize("behaviour", BEHAVIOURS | STATIC)
relaxed_behaviours = pytest.mark.parametrize("behaviour", BEHAVIOURS)


def _reduction(behaviour: str, keep: int, site: str = "projector") -> Reduction:
    """A reduction that keeps so many tokens, or as few as this kind can."""
    return Reduction(site, max(keep, LEAST.get(behaviour, 1)), **(BEHAVIOURS | STATIC)[behaviour])


def _reduce(
    reduction: Reduction, tokens: Tensor, mass: Tensor | None, features: dict[str, Tensor]
) -> StaticOutput:
    return static_reduce(reduction, reduction.count(TOKENS), tokens, mass, features)


def _score(name: str, features: dict[str, Tensor]) -> Tensor:
    """A score with its options at their defaults."""
    options = {key: torch.tensor(value) for key, value in ({"seed": 0} | PROBE).items()}
    return SCORES[name].function(*((features | options)[need] for need in SCORES[name].needs))


# *** scores


@pytest.mark.parametrize("name", SCORES)
@quick
@given(seed=seeds)
def test_scores_are_permutation_equivariant(name: str, seed: int) -> None:
    tokens, _, features = inputs(seed)
    features = {**features, "tokens": tokens, "grid": features["grid"].expand(3, -1, -1)}
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    plain = _score(name, features)
    shuffled = {
        need: value[:, order] if value.shape[1] == TOKENS else value
        for need, value in features.items()
    }
    assert_close(_score(name, shuffled), plain[:, order])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_in_single_precision(name: str, dtype: torch.dtype) -> None:
    tokens, _, features = inputs(0)
    features = {name: value.to(dtype) for name, value in features.items() if name != "grid"}
    features |= {"tokens": tokens.to(dtype), "grid": grid()}
    score = _score(name, features)
    assert score.dtype == torch.float32


def test_novelty_is_the_distance_to_the_nearest() -> None:
    tokens, _, _ = inputs(0, rows=1)
    for j, value in enumerate(operator.SCORES["novelty"].function(tokens)[0]):
        others = [F.cosine_similarity(tokens[0, j], tokens[0, i], 0) for i in range(TOKENS)]
        assert_close(value, -max(others[:j] + others[j + 1 :]))


def test_novelty_ignores_tokens_that_are_gone() -> None:
    tokens, _, _ = inputs(0)
    alive = torch.ones(3, TOKENS)
    alive[:, 20:] = 0
    novelty = SCORES["novelty"].function
    assert_close(novelty(tokens, alive)[:, :20], novelty(tokens[:, :20]))


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_grid_coverage_spreads_evenly_at_any_count(count: int) -> None:
    places = grid(8)
    best = operator.top_k(SCORES["grid_coverage"].function(places), None, count)[0]
    side = math.isqrt(count)
    cells = {(int(r) * side // 8, int(c) * side // 8) for _, r, c in places[best]}
    assert len(cells) == count


@quick
@given(seeds, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_standardize_forgets_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    score = inputs(seed, dtype=torch.float64)[2]["attention_last"]
    z = operator.standardize(score)
    # What may be rounding is no deviation: 1e-6 of the scores.
    assert_close(1 + z.mean(-1).float(), torch.ones(3))
    assert_close(z.std(-1, correction=0).float(), torch.ones(3))
    moved = operator.standardize(scale * (score + offset))
    # With the offset, a part of the deviation may be rounding.
    torch.testing.assert_close(moved, z, atol=1e-2, rtol=1e-2)


def test_standardize_makes_no_noise_of_a_constant() -> None:
    for value in (0.0, 0.1, 1 / 576, 1e4):
        assert operator.standardize(torch.full((2, 576), value)).abs().max() < 0.5


def test_standardize_over_the_living_only() -> None:
    score = torch.randn(2, 10)
    alive = torch.ones(2, 10)
    alive[:, 6:] = 0
    expected = operator.standardize(score[:, :6])
    assert_close(operator.standardize(score, alive)[:, :6], expected)


# *** selectors


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


@pytest.mark.parametrize(
    ("side", "count", "layout"),
    [(12, 16, (4, 4)), (12, 72, (6, 12)), (12, 18, (3, 6)), (12, 144, (12, 12)), (12, 1, (1, 1))],
)
def test_grid_layout(side: int, count: int, layout: tuple[int, int]) -> None:
    assert operator.grid_layout(side, side, count) == layout
    anchors = operator.grid_anchors(grid(side), count)
    assert anchors.shape == (1, count)
    assert (anchors.diff() > 0).all()


@quick
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 196))
def test_grid_layout_or_the_nearest_counts(height: int, width: int, count: int) -> None:
    try:
        down, across = operator.grid_layout(height, width, count)
    except ValueError as error:
        hint = str(error).split("keep one of ")[1]
        for near in map(int, hint.strip("[]").split(", ")):
            operator.grid_layout(height, width, near)
        return
    assert down * across == count and down <= height and across <= width


def test_grid_anchors_of_several_images_and_sparse_grids() -> None:
    both = operator.grid_anchors(grid(6, images=2), 8)[0].tolist()
    one = operator.grid_anchors(grid(6), 4)[0].tolist()
    assert both == one + [36 + anchor for anchor in one]
    every_other = torch.tensor([[0, 2 * r, 2 * c] for r in range(6) for c in range(6)])
    assert operator.grid_anchors(every_other, 4)[0].tolist() == one


def test_grid_anchors_refuse() -> None:
    with pytest.raises(ValueError, match="35 tokens are not 1 x 6 x 6"):
        operator.grid_anchors(grid()[1:], 4)
    with pytest.raises(ValueError, match="9 anchors do not split evenly over 2 images"):
        operator.grid_anchors(grid(6, images=2), 9)
    with pytest.raises(ValueError, match="7 windows do not fit .* keep one of"):
        operator.grid_anchors(grid(), 7)


def test_grid_preference_ranks_the_anchors_first() -> None:
    for count in (1, 4, 9, 18, 36):
        anchors = operator.grid_anchors(grid(), count)
        best = operator.top_k(grid_preference(grid(), count), None, count)
        assert torch.equal(operator.in_order(best), anchors)
    assert grid_preference(grid(), 7).shape == (1, TOKENS)
    assert torch.equal(grid_preference(grid()[1:], 7), SCORES["grid_coverage"].function(grid()[1:]))


# *** assignment and transfer


@quick
@given(seeds, st.integers(1, TOKENS), st.sampled_from([0.0, 0.01, 0.3, math.inf]))
def test_columns_of_the_assignment(seed: int, count: int, temperature: float) -> None:
    tokens, _, features = inputs(seed)
    parameters = {"gain": 1.0, "temperature": temperature}
    result = static_reduce(
        Reduction("projector", count, **parameters), count, tokens, None, features
    )
    columns = result.assignment.sum(dim=1)
    assert_close(columns, torch.ones(3, TOKENS - count))
    everything = torch.cat([result.receivers, result.sources], dim=1).sort(-1).values
    assert torch.equal(everything, torch.arange(TOKENS).expand(3, -1))


def test_nearest_gives_ties_to_the_first() -> None:
    similarity = torch.tensor([[[0.0, 1, 2], [0, 1, 3], [0, 0, 3]]])
    expected = torch.tensor([[[1.0, 1, 0], [0, 0, 1], [0, 0, 0]]])
    assert torch.equal(operator.nearest(similarity), expected)


@quick
@given(seeds, st.integers(1, TOKENS - 1))
def test_merge_is_a_plain_loop(seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed, dtype=torch.float64)
    result = static_reduce(_reduction("merge", count), count, tokens, mass, features)
    for row in range(3):
        kept = result.kept[row].tolist()
        sums = {i: mass[row, i] * tokens[row, i] for i in kept}
        masses = {i: mass[row, i] for i in kept}
        for j in set(range(TOKENS)) - set(kept):
            cosines = [F.cosine_similarity(tokens[row, i], tokens[row, j], 0) for i in kept]
            target = kept[int(torch.stack(cosines).argmax())]
            sums[target] = sums[target] + mass[row, j] * tokens[row, j]
            masses[target] = masses[target] + mass[row, j]
        expected = torch.stack([sums[i] / masses[i] for i in kept])
        assert_close(result.tokens[row], expected)
        assert_close(result.mass[row], torch.stack([masses[i] for i in kept]))


@quick
@given(seeds, st.integers(1, TOKENS - 1), st.floats(0.02, 5), st.floats(0, 1), st.floats(0, 2))
def test_soft_transfer_is_a_plain_loop(
    seed: int, count: int, temperature: float, gain: float, exponent: float
) -> None:
    tokens, _, features = inputs(seed, rows=1, dtype=torch.float64)
    reduction = Reduction(
        "projector",
        count,
        gain=gain,
        temperature=temperature,
        exponent=exponent,
        weighting="score",
        reweight=0.2,
    )
    result = static_reduce(reduction, count, tokens, None, features)
    x, score = tokens[0], features["attention_cls"][0]
    z = (score - score.mean()) / score.std(correction=0)
    kept = result.kept[0].tolist()
    totals = dict.fromkeys(kept, torch.tensor(1.0, dtype=torch.float64))
    sums = {i: x[i] for i in kept}
    for j in set(range(TOKENS)) - set(kept):
        closeness = {i: math.exp(F.cosine_similarity(x[i], x[j], 0) / temperature) for i in kept}
        for i in kept:
            content = gain * closeness[i] / sum(closeness.values()) * z[j].sigmoid()
            sums[i] = sums[i] + content * x[j]
            totals[i] = totals[i] + content
    expected = [sums[i] / totals[i] ** exponent * (1 + 0.2 * z[i]) for i in kept]
    # Similarities have an epsilon that cosine_similarity has elsewhere.
    assert_close(result.tokens[0].float(), torch.stack(expected).float())


def test_residual_is_the_mean_of_everything_dropped() -> None:
    tokens, _, features = inputs(0, rows=1)
    result = static_reduce(_reduction("residual", 5), 5, tokens, None, features)
    kept = result.kept[0].tolist()
    score = features["attention_cls"][0]
    worst = min(kept, key=lambda i: score[i])
    rest = sorted(set(range(TOKENS)) - set(kept) | {worst})
    for slot, i in enumerate(kept):
        expected = tokens[0, rest].mean(0) if i == worst else tokens[0, i]
        assert_close(result.tokens[0, slot], expected)
    assert result.mass.sum() == TOKENS


def test_uniform_gives_all_the_same_share() -> None:
    tokens, _, features = inputs(0)
    result = static_reduce(_reduction("uniform", 6), 6, tokens, None, features)
    lost = tokens.sum(1) - gather(tokens, result.kept).sum(1)
    expected = (gather(tokens, result.kept) + lost.unsqueeze(1) / 6) / (1 + 30 / 6)
    assert_close(result.tokens, expected)


@pytest.mark.parametrize("window", [2, 3])
def test_pooling_two_images_is_avg_pool2d(window: int) -> None:
    tokens = torch.randn(2, 2 * TOKENS, WIDTH)
    side = SIDE // window
    count = 2 * side**2
    result = static_reduce(_reduction("pool", count), count, tokens, None, {"grid": grid(images=2)})
    images = tokens.mT.reshape(2, WIDTH, 2, SIDE, SIDE).transpose(1, 2).flatten(0, 1)
    expected = F.avg_pool2d(images, window).unflatten(0, (2, 2)).transpose(1, 2).flatten(2).mT
    assert_close(result.tokens, expected)


@behaviours
@quick
@given(seed=seeds, count=st.sampled_from(COUNTS))
def test_shapes_order_and_rows(behaviour: str, seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed)
    reduction = _reduction(behaviour, count)
    count = reduction.count(TOKENS)
    result = _reduce(reduction, tokens, mass, features)
    assert result.tokens.shape == (3, count, WIDTH)
    assert result.kept.shape == result.mass.shape == (3, count)
    in_order = result.kept if reduction.order == "position" else result.kept.sort(dim=-1).values
    assert (in_order.diff(dim=-1) > 0).all()
    row = {name: value if name == "grid" else value[1:2] for name, value in features.items()}
    alone = _reduce(reduction, tokens[1:2], mass[1:2], row)
    assert torch.equal(alone.kept[0], result.kept[1])
    assert_close(alone.tokens[0], result.tokens[1])


@behaviours
@quick
@given(seed=seeds)
def test_keeping_all_is_the_identity(behaviour: str, seed: int) -> None:
    tokens, mass, features = inputs(seed)
    reduction = _reduction(behaviour, TOKENS)
    result = _reduce(reduction, tokens, mass, features)
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
    reduction = _reduction(behaviour, count)
    result = _reduce(reduction, tokens, mass, features)
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
    reduction = _reduction(behaviour, 9)
    ones = _reduce(reduction, tokens, torch.ones(3, TOKENS), features)
    none = _reduce(reduction, tokens, None, features)
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
    half = _reduce(_reduction(behaviour, 9), tokens.to(dtype), mass, rounded)
    single = {name: value if name == "grid" else value.float() for name, value in rounded.items()}
    full = _reduce(_reduction(behaviour, 9), tokens.to(dtype).float(), mass, single)
    assert half.tokens.dtype == dtype
    assert torch.equal(half.kept, full.kept)
    assert_close(full.tokens, half.tokens, 8)


def test_features_that_are_required_are_enough() -> None:
    tokens, mass, features = inputs(0)
    for behaviour in BEHAVIOURS | STATIC:
        reduction = _reduction(behaviour, 9)
        needed = required_features(reduction) - {"tokens"}
        given_ = {name: features[name] for name in needed}
        _reduce(reduction, tokens, mass, given_)
        for name in needed:
            fewer = {key: value for key, value in given_.items() if key != name}
            with pytest.raises(KeyError, match=name):
                _reduce(reduction, tokens, mass, fewer)


# *** graphs


def _record(reduction: Reduction, *, mass: bool) -> fx.GraphModule:
    """Writes a reduction into a graph; operators on constants alone are run at once."""
    graph = fx.Graph()
    needed = sorted(required_features(reduction) - {"tokens", "grid"})
    features = {name: graph.placeholder(_plain(name)) for name in needed}
    tokens = graph.placeholder("tokens")
    module = nn.Module()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(arguments)):
            return function(*arguments)
        return graph.call_function(function, pytree.tree_map(constant, arguments))

    def constant(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"constant_{len(module.state_dict())}"
        module.register_buffer(name, value)
        return graph.get_attr(name)

    masses = graph.placeholder("mass") if mass else None
    count = reduction.count(TOKENS)
    result = static_reduce(reduction, count, tokens, masses, {**features, "grid": grid()}, call)
    graph.output((result.tokens, result.kept))
    return fx.GraphModule(module, graph)


def _plain(name: str) -> str:
    """The name of a feature as that of a placeholder."""
    return name.replace("@", "_").replace(".", "_")


def _operators(module: fx.GraphModule) -> list[str]:
    return [node.target.__name__ for node in module.graph.nodes if node.op == "call_function"]


@behaviours
@pytest.mark.parametrize("mass", [False, True])
def test_a_recorded_reduction_computes_the_same(behaviour: str, mass: bool) -> None:
    tokens, masses, features = inputs(0)
    reduction = _reduction(behaviour, 9)
    module = _record(reduction, mass=mass)
    needed = required_features(reduction) - {"tokens", "grid"}
    values = {_plain(name): features[name] for name in needed} | {"tokens": tokens}
    if mass:
        values["mass"] = masses
    reduced, kept = module(**values)
    plain = _reduce(reduction, tokens, masses if mass else None, features)
    assert torch.equal(kept, plain.kept)
    assert torch.equal(reduced, plain.tokens)


def test_a_graph_has_only_the_operators_it_needs() -> None:
    def operators(behaviour: str) -> list[str]:
        module = _record(_reduction(behaviour, 9), mass=False)
        module.graph.eliminate_dead_code()
        return _operators(module)

    chosen = ["cls_attention", "top_k", "in_order"]
    assert operators("prune") == [*chosen, "take"]
    assert operators("merge") == [*chosen, "others", "similarity", "nearest", "merge"]
    assert operators("pool") == ["merge", "for_each_row"]
    assert operators("uniform") == [*chosen, "others", "uniform", "merge"]
    rest = ["cls_attention", "top_k", "narrow", "in_order", "others", "slot_of", "rest", "merge"]
    assert operators("residual") == rest


def test_the_code_of_a_graph_reads_like_the_method() -> None:
    module = _record(_reduction("merge", 9), mass=False)
    module.graph.eliminate_dead_code()
    module.recompile()
    body = [line.split(";")[0].strip() for line in module.code.splitlines() if " = " in line]
    assert body == [
        "cls_attention = deos_fx_operator_scores_cls_attention(attention_cls)",
        "top_k = deos_fx_operator_top_k(cls_attention, None, 9)",
        "in_order = deos_fx_operator_in_order(top_k)",
        "others = deos_fx_operator_others(in_order, tokens)",
        "similarity = deos_fx_operator_similarity({'feature': tokens}, {'feature': 1.0}, "
        "in_order, others)",
        "nearest = deos_fx_operator_nearest(similarity)",
        "merge = deos_fx_operator_merge(tokens, in_order, others, nearest)",
    ]


_ONNX_INPUTS = ("tokens", "mass", *(name for name in inputs(0)[2] if name != "grid"))


def _onnx_inputs(seed: int, rows: int) -> tuple[Tensor, ...]:
    tokens, mass, features = inputs(seed, rows=rows)
    return tuple((features | {"tokens": tokens, "mass": mass})[name] for name in _ONNX_INPUTS)


class _Several(nn.Module):
    """Several reductions side by side, so that one export serves them all."""

    behaviours = (
        "everything",
        "pool",
        "uniform",
        "every score",
        "max_min in steps",
        "determinantal",
        "distinct",
        "probe",
        "windows",
        "quota",
        "bipartite sorted",
        "neighbourhood",
        "contextual",
        "neighbours and rest",
        "interpolate",
    )

    def __init__(self) -> None:
        super().__init__()
        self.recorded = nn.ModuleList(
            _record(reduction, mass=True)
            for reduction in (*(_reduction(name, 4) for name in self.behaviours), WITH_CLASS_TOKEN)
        )

    def forward(self, *values: Tensor) -> list[Tensor]:
        given_ = dict(zip(map(_plain, _ONNX_INPUTS), values, strict=True))
        results = []
        for module in self.recorded:
            assert isinstance(module, fx.GraphModule)
            names = [node.name for node in module.graph.find_nodes(op="placeholder")]
            results.extend(module(**{name: given_[name] for name in names}))
        return results


# torch.onnx of 2.13 warns of its own deprecations, and that inputs share their batch axis.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name"
)
def test_onnx_runtime_agrees_at_another_batch() -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = _Several().eval()
    values = _onnx_inputs(0, rows=3)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        values,
        dynamo=True,
        dynamic_shapes=(tuple({0: batch} for _ in values),),
        verbose=False,
        optimize=False,
    )
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    operators = {node.op_type for node in program.model.graph}
    assert not operators & {"NonZero", "ScatterND", "Loop", "If"}
    scatters = [node for node in program.model.graph if node.op_type == "ScatterElements"]
    assert all(node.attributes.get_string("reduction", "none") == "none" for node in scatters)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    values = _onnx_inputs(1, rows=5)
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    for found, expected in zip(session.run(None, feed), model(*values), strict=True):
        assert_onnx_close(torch.from_numpy(found), expected)


# *** relaxed


@quick
@given(seeds, st.floats(0, 1), st.floats(1e-4, 10), st.booleans())
def test_soft_top_k_sums_to_the_count(
    seed: int, fraction: float, temperature: float, partial: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(4, TOKENS, generator=generator, dtype=torch.float64)
    alive = torch.rand(score.shape, generator=generator, dtype=torch.float64) ** 0.2
    alive = alive if partial else torch.ones_like(alive)
    count = fraction * alive.sum(-1)
    gates = soft_top_k(score, count, temperature, alive)
    # A count of 0 has no scale.
    torch.testing.assert_close(gates.sum(-1), count, atol=1e-9, rtol=0)
    assert (gates >= 0).all() and (gates <= alive).all()


@quick
@given(seeds, st.integers(0, TOKENS))
def test_soft_top_k_hardens_to_top_k(seed: int, count: int) -> None:
    noise = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(seed))
    score = noise.argsort(dim=-1) / TOKENS
    gates = soft_top_k(score, count, 1e-6, torch.ones_like(score))
    expected = F.one_hot(operator.top_k(score, None, count), TOKENS).sum(1).float()
    assert_close(gates, expected, 8)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_soft_top_k_gradients(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    alive = torch.rand(3, 9, generator=generator, dtype=torch.float64) * 0.5 + 0.4
    count = torch.tensor([0.7, 2.5, 4.0], dtype=torch.float64, requires_grad=True)
    values = (score, count, alive.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, c, a: soft_top_k(s, c, temperature, a), values, atol=1e-6
    )


def test_soft_top_k_gradient_to_the_count_survives_saturation() -> None:
    score = torch.arange(6.0).unsqueeze(0)
    for count in (0.0, 3.0, 6.0):
        wanted = torch.tensor(count, requires_grad=True)
        gates = soft_top_k(score, wanted, 1e-5, torch.ones(1, 6))
        (slope,) = torch.autograd.grad(gates.sum(), wanted)
        assert_close(slope, torch.tensor(1.0))


def _saturated(reduction: Reduction, fraction: float) -> RelaxedReduction:
    return RelaxedReduction.from_reduction(reduction, fraction).double()


@relaxed_behaviours
@quick
@given(seed=seeds, count=st.sampled_from(COUNTS))
def test_saturated_relaxed_is_static(behaviour: str, seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed, dtype=torch.float64)
    reduction = _reduction(behaviour, count)
    static = static_reduce(reduction, count, tokens, mass, features)
    alive = torch.ones_like(mass)
    relaxed = _saturated(reduction, count / TOKENS)(tokens, alive, mass, features)
    # Now and then two scores are closer than the gates are wide.
    assume(not ((relaxed.alive > 1e-5) & (relaxed.alive < 1 - 1e-5)).any())
    expected = F.one_hot(static.kept, TOKENS).sum(1).double()
    # Gates are open or shut to 1e-5 only, and so is what follows from them.
    torch.testing.assert_close(relaxed.alive, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        gather(relaxed.tokens, static.kept), static.tokens, atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(gather(relaxed.mass, static.kept), static.mass, atol=1e-3, rtol=1e-5)


def _left(name: str, values: Tensor, kept: Tensor) -> Tensor:
    """The feature of the tokens that are kept."""
    if name in ("text_tokens", "text_mask", "text_score", "normed_text", "class_token"):
        return values
    return gather(values.expand(len(kept), -1, -1) if name == "grid" else values, kept)


@pytest.mark.parametrize(
    ("first", "behaviour"),
    [
        (first, second)
        for first in ("merge", "prune", "pool", "everything")
        for second in BEHAVIOURS
        # A policy refuses grid anchors where the grid is incomplete.
        if first == "pool" or BEHAVIOURS[second].get("selector") != "grid"
    ],
)
def test_saturated_relaxed_is_static_after_another(first: str, behaviour: str) -> None:
    tokens, mass, features = inputs(3, dtype=torch.float64)
    one, two = _reduction(first, 9), _reduction(behaviour, 4, "decoder.1")
    static = static_reduce(one, 9, tokens, mass, features)
    left = {name: _left(name, value, static.kept) for name, value in features.items()}
    if first == "pool":
        left["grid"] = features["grid"][static.kept[0]]
    again = static_reduce(two, 4, static.tokens, static.mass, left)
    kept = static.kept.gather(1, again.kept)
    relaxed = _saturated(one, 9 / TOKENS)(tokens, torch.ones_like(mass), mass, features)
    relaxed = _saturated(two, 4 / 9)(relaxed.tokens, relaxed.alive, relaxed.mass, features)
    assert torch.equal(operator.in_order(operator.top_k(relaxed.alive, None, 4)), kept)
    # As above, gates are not saturated to the last digit.
    torch.testing.assert_close(gather(relaxed.tokens, kept), again.tokens, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gather(relaxed.mass, kept), again.mass, atol=1e-3, rtol=1e-5)


def test_what_has_a_relaxed_form_is_tested() -> None:
    searched = {name for name, row in SELECTORS.items() if row.relaxed}
    assert searched == {fields.get("selector", "top_k") for fields in BEHAVIOURS.values()}
    for behaviour in BEHAVIOURS:
        assert has_relaxed_form(_reduction(behaviour, 9))
    for behaviour in STATIC:
        assert not has_relaxed_form(_reduction(behaviour, 9))
        with pytest.raises(ValueError, match="has no relaxed form"):
            RelaxedReduction(_reduction(behaviour, 9), activation=0.5, retention=0.5)


@relaxed_behaviours
def test_an_inactive_site_is_the_identity(behaviour: str) -> None:
    tokens, mass, features = inputs(0, dtype=torch.float64)
    alive = 0.1 + 0.9 * torch.rand(
        mass.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    site = RelaxedReduction(_reduction(behaviour, 9), activation=0.0, retention=0.5)
    relaxed = site(tokens, alive, mass, features)
    # Constants of the grid are in single precision.
    assert_close(relaxed.tokens.float(), tokens.float())
    assert_close(relaxed.alive.float(), alive.float(), 8)
    assert_close(relaxed.mass.float(), mass.float())
    assert_close(site.keep_fraction(0.7), torch.tensor(0.7))
    assert_close(site.bias_after(0.3), torch.tensor(0.3))


@relaxed_behaviours
def test_gates_sum_to_the_fraction_kept(behaviour: str) -> None:
    tokens, mass, features = inputs(0)
    site = RelaxedReduction(_reduction(behaviour, 9), activation=0.8, retention=0.3)
    relaxed = site(tokens, torch.ones_like(mass), mass, features)
    assert_close(relaxed.alive.mean(-1), site.keep_fraction().expand(3))
    assert_close(site.keep_fraction(), torch.tensor(1 - 0.8 * 0.7))


@relaxed_behaviours
@pytest.mark.parametrize("extreme", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_gradients_are_finite_at_extreme_parameters(behaviour: str, extreme: float) -> None:
    tokens, mass, features = inputs(0)
    tokens.requires_grad_()
    for gate_temperature in (1.0, 1e-4):
        site = RelaxedReduction(
            _reduction(behaviour, 9),
            activation=0.9,
            retention=0.25,
            gate_temperature=gate_temperature,
        )
        for moved in [*site.parameters()]:
            before = moved.detach().clone()
            with torch.no_grad():
                moved.fill_(extreme)
            relaxed = site(tokens, torch.ones_like(mass), mass, features)
            loss = relaxed.tokens.square().mean() + (relaxed.alive * relaxed.mass.log()).mean()
            loss = loss + site.bias_after() + site.keep_fraction()
            site.zero_grad()
            loss.backward()
            grads = [p.grad for p in site.parameters() if p.grad is not None] + [tokens.grad]
            assert all(grad is not None and grad.isfinite().all() for grad in grads)
            with torch.no_grad():
                moved.copy_(before)


def test_every_learned_parameter_has_a_gradient() -> None:
    tokens, mass, features = inputs(0)
    start = Reduction(
        "projector", 9, **BEHAVIOURS["everything"] | {"scores": {"novelty": 1, "key_norm": 2}}
    )
    site = RelaxedReduction(start, activation=0.9, retention=0.3)
    relaxed = site(tokens, torch.ones_like(mass), mass, features)
    (relaxed.tokens.square().sum() + site.bias_after()).backward()
    for name, parameter in site.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_relaxed_gradients_are_those_of_finite_differences() -> None:
    tokens, mass, features = inputs(0, rows=2, dtype=torch.float64)
    start = Reduction(
        "projector",
        9,
        scores={"novelty": 1, "text_attention": 2},
        gain=0.6,
        temperature=0.3,
        similarity={"feature": 1, "key": 1},
        weighting="score",
        reweight=0.1,
        exponent=0.5,
    )
    site = RelaxedReduction(start, activation=0.8, retention=0.3).double()

    def output(*parameters: Tensor) -> Tensor:
        named = dict(zip([name for name, _ in site.named_parameters()], parameters, strict=True))
        given_ = (tokens, torch.ones_like(mass), mass, features)
        result = torch.func.functional_call(site, named, given_)
        return torch.cat([result.tokens.flatten(), result.alive.flatten(), result.mass.flatten()])

    parameters = [value.detach().clone().requires_grad_() for value in site.parameters()]
    assert torch.autograd.gradcheck(output, parameters, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relaxed_in_half_precision(dtype: torch.dtype) -> None:
    tokens, mass, features = inputs(0)
    features = {k: v if k == "grid" else v.to(dtype) for k, v in features.items()}
    site = RelaxedReduction(_reduction("everything", 9), activation=0.9, retention=0.3)
    relaxed = site(tokens.to(dtype), torch.ones_like(mass), mass, features)
    assert relaxed.tokens.dtype == dtype
    assert relaxed.alive.dtype == relaxed.mass.dtype == torch.float32
    assert torch.isfinite(relaxed.tokens).all()


@relaxed_behaviours
def test_discretising_a_saturated_site_gives_the_reduction_back(behaviour: str) -> None:
    reduction = _reduction(behaviour, 9)
    found = RelaxedReduction.from_reduction(reduction, 0.25).to_reduction("projector", 9)
    for name in ("scores", "similarity"):
        assert getattr(found, name) == pytest.approx(getattr(reduction, name), abs=1e-4)
    for name in ("selector", "weighting", "exponent", "residual", "position", "keep", "site"):
        assert getattr(found, name) == getattr(reduction, name)
    for name in ("diversity", "gain", "reweight", "mass_bias", "temperature"):
        assert getattr(found, name) == pytest.approx(getattr(reduction, name), abs=1e-4)


def test_discretising_drops_what_is_negligible() -> None:
    start = Reduction(
        "decoder.1",
        9,
        scores={"novelty": 999, "key_norm": 1},
        selector="greedy",
        diversity=0.001,
        gain=0.002,
        temperature=0.1,
        reweight=0.003,
        mass_bias=0.004,
    )
    site = RelaxedReduction(start, activation=0.9, retention=0.5)
    expected = Reduction("decoder.3", 0.25, scores={"novelty": 1})
    assert site.to_reduction("decoder.3", 0.25) == expected


def test_grid_search_passes_through_counts_without_a_layout() -> None:
    tokens, mass, features = inputs(0)
    alive = torch.ones_like(mass)
    for retention in torch.linspace(0.01, 0.99, 15).tolist():
        site = RelaxedReduction(_reduction("pool", 9), activation=1.0, retention=retention)
        relaxed = site(tokens, alive, mass, features)
        assert_close(relaxed.alive.mean(-1), torch.full((3,), retention))
