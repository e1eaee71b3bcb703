"""The published methods: their oracles where an independent check exists, and our presets."""

from __future__ import annotations

import itertools
import math

import published
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _attention(heads: int, length: int, seed: int = 0) -> Tensor:
    return (2 * _random(heads, length, length, seed=seed)).softmax(dim=-1)


@pytest.mark.parametrize("merged", [1, 5, 12, 40])
@pytest.mark.parametrize("class_token", [True, False])
def test_tome_conserves_the_sum_of_size_times_token(merged: int, class_token: bool) -> None:
    hidden, keys = _random(25, 6), _random(25, 2, 4, seed=1)
    sizes = torch.arange(1.0, 26.0)
    result = published.tome(hidden, keys, merged, sizes, class_token)
    assert len(result.tokens) == 25 - min(merged, 12)
    torch.testing.assert_close(result.sizes @ result.tokens, sizes @ hidden)
    torch.testing.assert_close(result.sizes.sum(), sizes.sum())
    assert sorted(itertools.chain(*result.groups)) == list(range(25))
    if class_token:
        torch.testing.assert_close(result.tokens[0], hidden[0])


def test_tome_merges_the_most_alike_pairs_first() -> None:
    hidden = torch.eye(6)
    keys = torch.tensor([[9.0, 0.0], [1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [-1.0, 0.1], [1.0, 1.0]])
    # Of 0, 2 and 4, 0 is CLS; 2 is all but parallel to 1, and 4 is opposite to all.
    result = published.tome(hidden, keys[:, None], 1)
    assert result.groups == [[0], [4], [1, 2], [3], [5]]


@pytest.mark.parametrize(("height", "width", "stride"), [(6, 6, 2), (6, 6, 3), (7, 5, 2)])
def test_avg_pool_is_avg_pool2d(height: int, width: int, stride: int) -> None:
    features = _random(height * width, 5)
    expected = F.avg_pool2d(features.T.reshape(1, 5, height, width), stride)
    result = published.avg_pool(features, width, stride)
    torch.testing.assert_close(result.tokens, expected[0].flatten(1).T)


def test_strides_of_m3() -> None:
    assert [published.avg_pool_stride(576, n) for n in (1, 9, 36, 144, 576)] == [24, 8, 4, 2, 1]


@pytest.mark.parametrize(("side", "stride"), [(6, 2), (27, 2), (8, 4)])
def test_bilinear_pool_averages_two_middle_cells_of_each_axis(side: int, stride: int) -> None:
    features = _random(side * side, 3)
    image = features.unflatten(0, (side, side))
    small = math.ceil(side / stride)

    def along(x: Tensor) -> Tensor:
        at = ((torch.arange(small) + 0.5) * side / small - 0.5).clamp(min=0)
        low = at.floor().long()
        high = (low + 1).clamp(max=side - 1)
        part = (at - low)[:, None, None]
        return x[low] * (1 - part) + x[high] * part

    expected = along(along(image).transpose(0, 1)).transpose(0, 1)
    result = published.bilinear_pool(features, side, stride)
    torch.testing.assert_close(result.tokens, expected.flatten(0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_determinantal_picks_the_largest_determinant_at_every_step(seed: int) -> None:
    relevance = _random(7, seed=seed).abs() + 0.1
    features = _random(7, 5, seed=seed + 10)
    kernel = relevance[:, None] * published.cosines(features, features) * relevance
    chosen: list[int] = []
    for j in published.determinantal(kernel.double(), 5):
        volumes = [
            float(torch.linalg.det(kernel.double()[[*chosen, i]][:, [*chosen, i]]))
            if i not in chosen
            else -math.inf
            for i in range(7)
        ]
        chosen.append(j)
        assert j == max(range(7), key=volumes.__getitem__)


@pytest.mark.parametrize("seed", range(4))
def test_max_min_starts_lonely_and_stays_far(seed: int) -> None:
    features = _random(9, 4, seed=seed)
    distance = 1 - published.cosines(features, features)
    first, *later = published.max_min(features, 5)
    alone = distance + 9 * torch.eye(9)
    assert first == int(alone.amin(dim=1).argmax())
    for step, j in enumerate(later, start=1):
        before = [first, *later][:step]
        assert j == int(distance[before].amin(dim=0).argmax())


@pytest.mark.parametrize("tokens", [48, 50, 63])
def test_quotas_of_holov_sum_to_the_count(tokens: int) -> None:
    windows = published.holov_windows(tokens, 16)
    assert list(itertools.chain(*windows)) == list(range(tokens))
    assert max(map(len, windows)) - min(map(len, windows)) <= 1
    for seed in range(5):
        weights = _random(16, seed=seed).abs().tolist()
        quotas = published.holov_quotas(weights, 20)
        assert sum(quotas) == 20
        share = [20 * weight / sum(weights) for weight in weights]
        assert all(abs(q - s) <= 1 for q, s in zip(quotas, share, strict=True))


def test_holov_pads_what_a_short_window_cannot_hold() -> None:
    attention = torch.full((1, 33, 33), 1e-6)
    attention[0, 0, 1:3] = 0.4
    result = published.holov(_random(32, 4), attention, 8)
    assert result.kept == [0, 1, *[-1] * 6]
    assert not result.tokens[2:].any()


@pytest.mark.parametrize(("keep", "left"), [(96, 96), (64, 64), (100, 98)])
def test_vscan_keeps_fewer_where_windows_do_not_divide(keep: int, left: int) -> None:
    near, far = _attention(1, 577), _attention(1, 577, seed=1)
    result = published.vscan(_random(576, 4), near, far, 24, keep)
    assert len(result.kept) == left
    share = int(keep / 2) // 16
    for top, start in itertools.product(range(0, 24, 6), repeat=2):
        inside = [
            i for i in result.kept if top <= i // 24 < top + 6 and start <= i % 24 < start + 6
        ]
        assert len(inside) >= share


def test_visionzip_adds_the_mean_to_its_targets() -> None:
    hidden, keys, attention = _random(17, 3), _random(17, 2, 4), _attention(2, 17)
    result = published.visionzip(hidden, keys, attention, 5, 4)
    assert len(result.tokens) == 9
    assert result.kept[0] == -1 and result.kept[1:5] == sorted(result.kept[1:5])
    rest = [j for j in range(16) if j not in result.kept[1:5]]
    assert result.kept[5:] == rest[::3]
    torch.testing.assert_close(result.tokens[:5], hidden[[0, *(i + 1 for i in result.kept[1:5])]])
    # With one key for all, every dropped patch joins the first target.
    same = published.visionzip(hidden, torch.ones(17, 2, 4), attention, 5, 4)
    dropped = [j for j in rest if j not in same.kept]
    expected = hidden[1:][same.kept[5]] + hidden[1:][dropped].mean(dim=0)
    torch.testing.assert_close(same.tokens[5], expected)


def test_gravity_of_sparsevlm_is_the_product_of_rotated_ones() -> None:
    """Where attention is the gravity itself, all tokens score alike; a boost is then seen."""
    size, length, visual = 8, 20, range(4, 12)
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(length)[:, None] * torch.cat([frequencies, frequencies])
    ones = torch.ones(length, size)
    half = torch.cat([-ones[:, : size // 2], ones[:, size // 2 :]], dim=1)
    rotated = ones * angle.cos() + half * angle.sin()
    gravity = rotated @ rotated.T / math.sqrt(size)
    attention = gravity.repeat(4, 1, 1)
    for favourite in (5, 9):
        boosted = attention.clone()
        boosted[:, :, favourite] += 0.5 * gravity[:, favourite]
        hidden = _random(length, 3)
        kept = published.sparsevlm_plus(
            hidden, boosted, [0, 3, 7], range(length), frequencies, visual, 1
        ).kept
        assert kept == [favourite - 4]


def test_fitprune_drops_what_neither_text_nor_image_looks_at() -> None:
    attention = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    visual = range(2, 8)
    strongest = attention.amax(dim=0)
    cross, own = strongest[8:, 2:8].sum(dim=0), strongest[2:8, 2:8].mean(dim=0)
    kept = published.fitprune(_random(12, 4), attention, visual, 2).kept
    assert sorted((cross * own).argsort().tolist()[2:]) == kept
    full = float(cross.sum()) / 4, float(own.sum())
    sizes = [
        len(published.fitprune_drops(attention, visual, *full, alpha))
        for alpha in (0.0, 0.3, 0.6, 0.9)
    ]
    assert sizes[0] == 0 and sizes == sorted(sizes)


def test_evit_fuses_the_others_unnormalised() -> None:
    hidden, attention = _random(11, 4), _attention(2, 11)
    result = published.evit(hidden, attention, 0.55)
    assert len(result.tokens) == math.ceil(0.55 * 10) + 1
    received = attention[:, 0, 1:].mean(dim=0)
    assert result.kept[:-1] == received.argsort(descending=True).tolist()[:6]
    whole = published.evit(hidden, attention, 0.1).tokens[-1]
    best = int(received.argmax())
    torch.testing.assert_close(whole, received @ hidden[1:] - received[best] * hidden[1 + best])


def test_prumerge_adds_every_neighbour_when_all_are_neighbours() -> None:
    features, queries, keys = _random(12, 6), _random(13, 6, seed=1), _random(13, 6, seed=2)
    result = published.prumerge(features, queries, keys, 4, neighbours=11)
    attention = (queries @ keys.T / math.sqrt(6)).softmax(dim=-1)[0, 1:]
    everything = attention @ features
    for token, i in zip(result.tokens, result.kept[:-1], strict=False):
        torch.testing.assert_close(token, features[i] * (1 - attention[i]) + everything)
    kept = result.kept[:-1]
    torch.testing.assert_close(result.tokens[-1], everything - attention[kept] @ features[kept])
    plus = published.prumerge_plus(features, queries, keys, 2, neighbours=11)
    assert plus.kept[:2] == result.kept[:2]
    assert plus.kept[2:-1] == [j for j in range(0, 11, 2) if j not in plus.kept[:2]]


def test_a_single_pivot_of_dart_keeps_what_is_least_like_it() -> None:
    hidden, keys = _random(12, 5), _random(2, 12, 3)
    keys[:, 4] *= 100
    result = published.dart(hidden, hidden, keys, range(2, 10), 3, 1, 0)
    unlike = published.cosines(hidden[[4]], hidden[2:10])[0].argsort().tolist()[:3]
    assert result.kept == sorted([2, *unlike])


def test_hiprune_keeps_anchors_and_their_neighbours() -> None:
    shallow, deep = torch.zeros(1, 26, 26), torch.zeros(1, 26, 26)
    shallow[:, :, 1 + 12] = 1
    deep[:, :, 1:] = torch.arange(25.0)
    kept = published.hiprune(_random(25, 3), shallow, deep, 5, 7, alpha=0.7).kept
    assert kept == sorted([12, 11, 13, 7, 17, 24, 23])
