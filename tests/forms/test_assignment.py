"""What dropped tokens leave behind: every assignment against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from behaviours import reduction_of
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from site_inputs import SIDE, TOKENS, WIDTH, falling, gather, grid, inputs, quick, seeds
from torch import Tensor
from torch.nn import functional as F

from deos_fx import operator
from deos_fx.forms.static import static_reduce
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier


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


@quick
@given(seeds, st.integers(1, TOKENS - 1))
def test_merge_is_a_plain_loop(seed: int, count: int) -> None:
    tokens, mass, features = inputs(seed, dtype=torch.float64)
    result = static_reduce(reduction_of("merge", count), count, tokens, mass, features)
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
    result = static_reduce(reduction_of("residual", 5), 5, tokens, None, features)
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
    result = static_reduce(reduction_of("uniform", 6), 6, tokens, None, features)
    lost = tokens.sum(1) - gather(tokens, result.kept).sum(1)
    expected = (gather(tokens, result.kept) + lost.unsqueeze(1) / 6) / (1 + 30 / 6)
    assert_close(result.tokens, expected)


@pytest.mark.parametrize("window", [2, 3])
def test_pooling_two_images_is_avg_pool2d(window: int) -> None:
    tokens = torch.randn(2, 2 * TOKENS, WIDTH)
    side = SIDE // window
    count = 2 * side**2
    result = static_reduce(
        reduction_of("pool", count), count, tokens, None, {"grid": grid(images=2)}
    )
    images = tokens.mT.reshape(2, WIDTH, 2, SIDE, SIDE).transpose(1, 2).flatten(0, 1)
    expected = F.avg_pool2d(images, window).unflatten(0, (2, 2)).transpose(1, 2).flatten(2).mT
    assert_close(result.tokens, expected)


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
    kept = falling(a, list(range(TOKENS)))[:7]
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


def test_raw_scores_stand_in_place_of_masses() -> None:
    tokens, mass, features = inputs(0)
    reduction = Reduction("projector", 6, residual=True, weighting="raw", exponent=0)
    with_masses = static_reduce(reduction, 6, tokens, mass, features)
    without = static_reduce(reduction, 6, tokens, None, features)
    assert torch.equal(with_masses.tokens, without.tokens)
    assert_close(with_masses.mass.sum(-1), mass.sum(-1))
