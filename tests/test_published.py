"""The published methods: their oracles where an independent check exists, and our presets."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import published
import pytest
import tiny
import torch
from closeness import assert_close
from torch import Tensor
from torch.nn import functional as F

from deos_fx import Policy, presets, reference, transform
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce
from deos_fx.policy.reduction import Reduction


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
    assert_close(result.sizes @ result.tokens, sizes @ hidden)
    assert_close(result.sizes.sum(), sizes.sum())
    assert sorted(itertools.chain(*result.groups)) == list(range(25))
    if class_token:
        assert_close(result.tokens[0], hidden[0])


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
    assert_close(result.tokens, expected[0].flatten(1).T)


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
    assert_close(result.tokens, expected.flatten(0, 1))


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
    assert_close(result.tokens[:5], hidden[[0, *(i + 1 for i in result.kept[1:5])]])
    # With one key for all, every dropped patch joins the first target.
    same = published.visionzip(hidden, torch.ones(17, 2, 4), attention, 5, 4)
    dropped = [j for j in rest if j not in same.kept]
    expected = hidden[1:][same.kept[5]] + hidden[1:][dropped].mean(dim=0)
    assert_close(same.tokens[5], expected)


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
    assert_close(whole, received @ hidden[1:] - received[best] * hidden[1 + best])


def test_prumerge_adds_every_neighbour_when_all_are_neighbours() -> None:
    features, queries, keys = _random(12, 6), _random(13, 6, seed=1), _random(13, 6, seed=2)
    result = published.prumerge(features, queries, keys, 4, neighbours=11)
    attention = (queries @ keys.T / math.sqrt(6)).softmax(dim=-1)[0, 1:]
    everything = attention @ features
    for token, i in zip(result.tokens, result.kept[:-1], strict=False):
        assert_close(token, features[i] * (1 - attention[i]) + everything)
    kept = result.kept[:-1]
    assert_close(result.tokens[-1], everything - attention[kept] @ features[kept])
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


# The presets, on the same raw quantities


class Tower(NamedTuple):
    """What a vision tower did with one image of N patches.

    Attributes:
        hidden: [1 + N, d] out of the block before the site, CLS first.
        projected: [N, D] of its patches.
        attention: [H, 1 + N, 1 + N] of that block.
        earlier: [H, 1 + N, 1 + N] of an earlier block.
        keys: [1 + N, H, d / H] of the block before the site.
        next_queries: [1 + N, d] of the block after the site, on the same hidden states.
        next_keys: [1 + N, d].
        text: [T, D] embeddings of the question.
        width: Patches in a row.
    """

    hidden: Tensor
    projected: Tensor
    attention: Tensor
    earlier: Tensor
    keys: Tensor
    next_queries: Tensor
    next_keys: Tensor
    text: Tensor
    width: int


class Prompt(NamedTuple):
    """What a language model did with one prompt of L tokens and one image.

    Attributes:
        hidden: [L, d] out of the layer before the site.
        normed: [L, d] the same after the final norm.
        attention: [H, L, L] of that layer.
        keys: [G, L, D] of that layer, rotated.
        next_queries: [H, L, D] of the layer after the site, on the same hidden states, rotated.
        next_keys: [G, L, D].
        embeddings: [L, d] into the first layer.
        frequencies: [D / 2] of the rotary embedding.
        visual: Where the image is.
    """

    hidden: Tensor
    normed: Tensor
    attention: Tensor
    keys: Tensor
    next_queries: Tensor
    next_keys: Tensor
    embeddings: Tensor
    frequencies: Tensor
    visual: range

    @property
    def image(self) -> slice:
        return slice(self.visual.start, self.visual.stop)

    @property
    def question(self) -> slice:
        return slice(self.visual.stop, None)


def _random_tower(seed: int) -> Tower:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return Tower(
        hidden=draw(65, 24),
        projected=draw(64, 32),
        attention=(2 * draw(4, 65, 65)).softmax(dim=-1),
        earlier=(2 * draw(4, 65, 65)).softmax(dim=-1),
        keys=draw(65, 4, 6),
        next_queries=2 * draw(65, 24),
        next_keys=2 * draw(65, 24),
        text=draw(5 + seed % 3, 32),
        width=8,
    )


def _random_prompt(seed: int) -> Prompt:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    length = 4 + 64 + 6 + seed % 3
    causal = torch.full((length, length), -math.inf).triu(1)
    return Prompt(
        hidden=draw(length, 32),
        normed=draw(length, 32),
        attention=(2 * draw(4, length, length) + causal).softmax(dim=-1),
        keys=draw(2, length, 8),
        next_queries=2 * draw(4, length, 8),
        next_keys=draw(2, length, 8),
        embeddings=draw(length, 32),
        frequencies=10000.0 ** (-torch.arange(0, 8, 2) / 8),
        visual=range(4, 68),
    )


def _watched_tower(model: Any, pixels: Tensor, ids: Tensor, block: int) -> Tower:
    """What the tower of a model with eager attention does with an image, at a block."""
    vision = model.model.vision_tower
    seen = vision(pixels, output_hidden_states=True, output_attentions=True)
    own, following = vision.encoder.layers[block], vision.encoder.layers[block + 1]
    hidden = seen.hidden_states[block + 1][0]
    normed, after = own.layer_norm1(seen.hidden_states[block][0]), following.layer_norm1(hidden)
    heads = model.config.vision_config.num_attention_heads
    question = ids[int((ids == model.config.image_token_id).nonzero()[-1]) + 1 :]
    return Tower(
        hidden=hidden,
        projected=model.model.multi_modal_projector(hidden[1:]),
        attention=seen.attentions[block][0],
        earlier=seen.attentions[block - 1][0],
        keys=own.self_attn.k_proj(normed).unflatten(-1, (heads, -1)),
        next_queries=following.self_attn.q_proj(after),
        next_keys=following.self_attn.k_proj(after),
        text=model.get_input_embeddings()(question),
        width=math.isqrt(len(hidden) - 1),
    )


def _watched_prompt(model: Any, prompt: Mapping[str, Tensor], layer: int) -> Prompt:
    """What the decoder of a model with eager attention does with an unpadded prompt, at a layer."""
    seen = model(**prompt, output_hidden_states=True, output_attentions=True)
    decoder = model.model.language_model
    where = (prompt["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    own, following = decoder.layers[layer], decoder.layers[layer + 1]
    hidden = seen.hidden_states[layer + 1][0]
    return Prompt(
        hidden=hidden,
        normed=decoder.norm(hidden),
        attention=seen.attentions[layer][0],
        keys=_rotated(decoder, own, own.self_attn.k_proj, seen.hidden_states[layer][0]),
        next_queries=_rotated(decoder, following, following.self_attn.q_proj, hidden),
        next_keys=_rotated(decoder, following, following.self_attn.k_proj, hidden),
        embeddings=seen.hidden_states[0][0],
        frequencies=decoder.rotary_emb.inv_freq,
        visual=range(where[0], where[-1] + 1),
    )


@functools.cache
def _reference() -> tuple[Any, list[dict[str, Tensor]]]:
    """The reference model with eager attention, and three prompts it was not trained on."""
    model, processor = reference.load()
    model.set_attn_implementation("eager")
    examples = reference.make_examples(3, "test")
    prompts = list(reference.batches(processor, examples, 1, answers=False))
    return model.requires_grad_(False), prompts


@functools.cache
def _real_tower(seed: int) -> Tower:
    model, prompts = _reference()
    return _watched_tower(model, prompts[seed]["pixel_values"], prompts[seed]["input_ids"][0], 2)


@functools.cache
def _real_prompt(seed: int) -> Prompt:
    model, prompts = _reference()
    return _watched_prompt(model, prompts[seed], 2)


def _rotated(decoder: Any, layer: Any, project: Any, hidden: Tensor) -> Tensor:
    """Queries or keys [heads, L, D] of a layer, with the angles of positions 0, 1, 2, ..."""
    x = project(layer.input_layernorm(hidden))
    x = x.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)
    angle = torch.arange(len(hidden))[:, None] * decoder.rotary_emb.inv_freq
    first, second = x.chunk(2, dim=-1)
    turned = (
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    )
    return torch.cat(turned, dim=-1)


def _tower_features(towers: Sequence[Tower], site: str, earlier: str) -> dict[str, Tensor]:
    """Features of images, each straight from its definition."""
    count, width = len(towers[0].projected), towers[0].width
    cells = [[0, i // width, i % width] for i in range(count)]
    length = max(len(tower.text) for tower in towers)
    text = [F.pad(tower.text, (0, 0, 0, length - len(tower.text))) for tower in towers]
    rows: dict[str, list[Tensor]] = {
        "tokens": [t.projected if site == "projector" else t.hidden[1:] for t in towers],
        "class_token": [t.hidden[:1] for t in towers],
        "attention_cls": [t.attention.mean(dim=0)[0, 1:] for t in towers],
        f"attention_cls@{earlier}": [t.earlier.mean(dim=0)[0, 1:] for t in towers],
        "attention_mutual": [t.attention.mean(dim=(0, 1))[1:] for t in towers],
        f"attention_mutual@{earlier}": [t.earlier.mean(dim=(0, 1))[1:] for t in towers],
        "keys": [t.keys[1:].mean(dim=1) for t in towers],
        "joint_keys": [t.keys[1:].flatten(1) for t in towers],
        "joint_keys@next": [t.next_keys[1:] for t in towers],
        "attention_cls_joint@next": [
            (t.next_queries[0] @ t.next_keys.T / math.sqrt(t.next_keys.shape[1])).softmax(0)[1:]
            for t in towers
        ],
        "text_tokens": text,
        "text_mask": [(torch.arange(length) < len(t.text)).float() for t in towers],
    }
    return {name: torch.stack(row) for name, row in rows.items()} | {"grid": torch.tensor(cells)}


def _prompt_features(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Features of prompts; the texts after the images are padded to one length."""
    length = max(len(p.hidden) - p.visual.stop for p in prompts)

    def padded(x: Tensor, value: float = 0.0) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, length - len(x)), value=value)

    rows: dict[str, list[Tensor]] = {
        "tokens": [p.hidden[p.image] for p in prompts],
        "normed_tokens": [p.normed[p.image] for p in prompts],
        "normed_text": [padded(p.normed[p.question]) for p in prompts],
        "attention_last": [p.attention[:, -1, p.image].mean(dim=0) for p in prompts],
        "attention_last@next": [_next_attention(p) for p in prompts],
        "attention_raters_plus": [_rater_attention(p) for p in prompts],
        "attention_text_max": [
            p.attention.amax(dim=0)[p.question, p.image].sum(dim=0) for p in prompts
        ],
        "attention_mutual_max": [
            p.attention.amax(dim=0)[p.image, p.image].mean(dim=0) for p in prompts
        ],
        "joint_keys": [p.keys[:, p.image].transpose(0, 1).flatten(1) for p in prompts],
        "text_score": [
            padded(p.keys[:, p.question].abs().sum(dim=(0, 2)), torch.finfo().min) for p in prompts
        ],
    }
    return {name: torch.stack(row) for name, row in rows.items()}


def _next_attention(prompt: Prompt) -> Tensor:
    """Attention [N] of the last token in the next layer, mean over heads."""
    keys = prompt.next_keys.repeat_interleave(len(prompt.next_queries) // len(prompt.next_keys), 0)
    logits = (prompt.next_queries[:, -1:] @ keys.mT)[:, 0] / math.sqrt(keys.shape[-1])
    return logits.softmax(dim=-1).mean(dim=0)[prompt.image]


def _rater_attention(prompt: Prompt, heads: int = 14) -> Tensor:
    """SparseVLM+: attention [N] of the raters, calibrated, in the heads that see most of it."""
    visual, text = prompt.embeddings[prompt.image], prompt.embeddings[prompt.question]
    called = (visual @ text.T).softmax(dim=1).mean(dim=0)
    place = torch.arange(len(prompt.hidden)).float()
    angle = (place[prompt.question, None] - place[prompt.image])[..., None] * prompt.frequencies
    gravity = angle.cos().sum(dim=-1) / math.sqrt(len(prompt.frequencies) / 2)
    seen = (prompt.attention[:, prompt.question, prompt.image] / gravity)[:, called > called.mean()]
    best = seen.sum(dim=(1, 2)).topk(min(heads, len(seen))).indices
    return seen[best].mean(dim=(0, 1))


class Case(NamedTuple):
    """A preset and the method that it must be.

    Attributes:
        policy: The preset for N visual tokens; only its first reduction is looked at here.
        oracle: What that must give, from the raw quantities and the visual tokens at its site.
    """

    policy: Callable[[int], Policy]
    oracle: Callable[[Any, Tensor], published.Reduced]


def _sparsevlm_plus(prompt: Prompt, x: Tensor) -> published.Reduced:
    raters = published.sparsevlm_raters(prompt.embeddings, prompt.visual)
    positions = range(len(prompt.hidden))
    where = (raters, positions, prompt.frequencies, prompt.visual)
    return published.sparsevlm_plus(prompt.hidden, prompt.attention, *where, 20)


def _holov(tower: Tower, x: Tensor) -> published.Reduced:
    """Without the zeros it is filled up with: the preset has the best of the others there."""
    result = published.holov(x, tower.attention, 22)
    real = [i for i in result.kept if i >= 0]
    return published.Reduced(result.tokens[: len(real)], real)


def _tome(tower: Tower, x: Tensor) -> published.Reduced:
    """Without CLS, which comes first and stays as it is."""
    merged = published.tome(tower.hidden, tower.keys, 20)
    return published.Reduced(merged.tokens[1:], [group[0] - 1 for group in merged.groups[1:]])


IN_TOWER = {
    "visionzip": Case(
        lambda n: presets.visionzip(14, 8),
        lambda t, x: published.visionzip(t.hidden, t.keys, t.attention, 14, 8),
    ),
    "prumerge": Case(
        lambda n: presets.prumerge(17),
        lambda t, x: published.prumerge(x, t.next_queries, t.next_keys, 16),
    ),
    "prumerge_plus": Case(
        lambda n: presets.prumerge_plus(8, 14, n),
        lambda t, x: published.prumerge_plus(x, t.next_queries, t.next_keys, 8, 14),
    ),
    "fastervlm": Case(
        lambda n: presets.fastervlm(16),
        lambda t, x: published.fastervlm(x, t.attention, 16),
    ),
    "vispruner": Case(
        lambda n: presets.vispruner(25, 0.5),
        lambda t, x: published.vispruner(x, t.attention, 25, 0.5),
    ),
    "cdpruner": Case(
        lambda n: presets.cdpruner(16),
        lambda t, x: published.cdpruner(x, x, t.text, 16),
    ),
    "divprune": Case(
        lambda n: presets.divprune(0.25),
        lambda t, x: published.divprune(x, 0.25),
    ),
    "hiprune": Case(
        lambda n: presets.hiprune(24, 0.5),
        lambda t, x: published.hiprune(x, t.earlier, t.attention, t.width, 24, 0.5),
    ),
    "hiprune_no_anchors": Case(
        lambda n: presets.hiprune(24, 0.1),
        lambda t, x: published.hiprune(x, t.earlier, t.attention, t.width, 24, 0.1),
    ),
    "holov": Case(lambda n: presets.holov(22), _holov),
    "vscan": Case(
        lambda n: presets.vscan(24, windows=4),
        lambda t, x: published.vscan(x, t.earlier, t.attention, t.width, 24, t.width // 2),
    ),
    "tome": Case(lambda n: presets.tome(20, 1, n), _tome),
    "evit": Case(
        lambda n: presets.evit(0.7, (3,), n),
        lambda t, x: published.evit(t.hidden, t.attention, 0.7),
    ),
    "avg_pool": Case(
        lambda n: presets.avg_pool(keep=n // 4),
        lambda t, x: published.avg_pool(x, t.width, 2),
    ),
    "bilinear_pool": Case(
        lambda n: presets.bilinear_pool(keep=n // 16),
        lambda t, x: published.bilinear_pool(x, t.width, 4),
    ),
}
IN_DECODER = {
    "fastv": Case(
        lambda n: presets.fastv(3, 0.25),
        lambda p, x: published.fastv(p.hidden, p.attention, p.visual, 0.75),
    ),
    "pyramid_drop": Case(
        lambda n: presets.pyramid_drop((3,), (0.5,)),
        lambda p, x: published.pyramid_drop(
            p.hidden, p.next_queries, p.next_keys, p.visual, published.pyramid_count(len(x), 0.5)
        ),
    ),
    "sparsevlm_plus": Case(lambda n: presets.sparsevlm_plus((2,), (20,)), _sparsevlm_plus),
    "fitprune": Case(
        lambda n: presets.fitprune((36, 0, 0), n),
        lambda p, x: published.fitprune(p.hidden, p.attention, p.visual, 36),
    ),
    "dart": Case(
        lambda n: presets.dart(3, 3 + 5 * 6, 3, 2),
        lambda p, x: published.dart(
            p.hidden, p.normed, p.keys, p.visual, 6, 3, 2, order="position"
        ),
    ),
}
CASES = IN_TOWER | IN_DECODER


def _placed(reduction: Reduction, block: int) -> Reduction:
    """The same reduction after another block, observing the one before where it named one."""

    def moved(where: str, to: int) -> str:
        stage, _, index = where.partition(".")
        return f"{stage}.{to}" if index else where

    tiers = tuple(replace(t, observe=moved(t.observe, block - 1)) for t in reduction.tiers)
    observe = moved(reduction.observe, block - 1)
    return replace(reduction, site=moved(reduction.site, block), observe=observe, tiers=tiers)


def _visual(sample: Tower | Prompt, site: str) -> Tensor:
    """The visual tokens [N, d] at a site."""
    if isinstance(sample, Prompt):
        return sample.hidden[sample.image]
    return sample.projected if site == "projector" else sample.hidden[1:]


@functools.cache
def _expected(name: str, kind: str, seed: int, site: str) -> published.Reduced:
    sample = MAKERS[name in IN_DECODER, kind](seed)
    return CASES[name].oracle(sample, _visual(sample, site))


MAKERS: Mapping[tuple[bool, str], Callable[[int], Any]] = {
    (False, "random"): _random_tower,
    (False, "real"): _real_tower,
    (True, "random"): _random_prompt,
    (True, "real"): _real_prompt,
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("name", CASES)
def test_preset_is_the_published_method(name: str, kind: str, batch: int) -> None:
    samples = [MAKERS[name in IN_DECODER, kind](seed) for seed in range(batch)]
    count = len(_visual(samples[0], ""))
    reduction = _placed(CASES[name].policy(count).reductions[0], 2)
    features = (
        _prompt_features(samples)
        if name in IN_DECODER
        else _tower_features(samples, reduction.site, "vision.1")
    )
    assert required_features(reduction) <= features.keys()
    keep = reduction.count(count)
    result = static_reduce(reduction, keep, features["tokens"], None, features)
    for row in range(batch):
        expected = _expected(name, kind, row, reduction.site)
        assert len(expected.kept) == keep or name == "holov"
        ours = result.tokens[row, : len(expected.kept)]
        assert_close(ours, expected.tokens)
        # What is fused, pooled or a copy of CLS stands for no single patch.
        one = torch.tensor([place >= 0 for place in expected.kept])
        kept = result.kept[row, : len(expected.kept)]
        assert kept[one].tolist() == [place for place in expected.kept if place >= 0]


@pytest.mark.parametrize("name", CASES)
def test_graph_hands_on_the_published_tokens(name: str) -> None:
    """What enters the next block of a reduced model, for prompts padded to one length."""
    model, eager = tiny.tiny_llava(4), tiny.shared_llava(4, "eager")
    batch = tiny.inputs(model, 3)
    rows = [tiny.row_of(batch, row) for row in range(3)]
    # As generate does; without, transformers counts padding, and the size of a rotated key, which
    # DART reads, depends on its position.
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    # ToMe and EViT reduce where the tower goes on, the others of it at its end.
    inside, block = name in ("tome", "evit"), {"tome": 0, "evit": 0}.get(name, 1)
    tower, decoder = model.model.vision_tower.encoder.layers, model.model.language_model.layers
    samples: list[Any]
    if name in IN_DECODER:
        block, after = 2, decoder[3]
        samples = [_watched_prompt(eager, row, block) for row in rows]
    else:
        after = tower[1] if inside else decoder[0]
        images = [(row["pixel_values"], row["input_ids"][0]) for row in rows]
        samples = [_watched_tower(eager, *image, block) for image in images]
    reduction = _placed(CASES[name].policy(tiny.VISUAL).reductions[0], block)
    reduced = transform(model, policy=Policy((reduction,)), example_inputs=batch)
    entered: list[Tensor] = []
    after.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    reduced(**batch)
    for row, sample in enumerate(samples):
        expected = CASES[name].oracle(sample, _visual(sample, reduction.site)).tokens
        if reduction.site.startswith("vision") and not inside:
            expected = eager.model.multi_modal_projector(expected)
        start = 1 if inside else int((batch["input_ids"][row] == tiny.IMAGE).nonzero()[0])
        ours = entered[-1][row, start : start + len(expected)]
        assert_close(ours, expected)


def test_defaults_keep_what_the_official_code_keeps_of_576_tokens() -> None:
    def counts(policy: Policy) -> list[int]:
        return policy.counts(576)

    assert counts(presets.fastv()) == [round(576 * (1 - 0.5))]
    ratios = (0.5, 0.25, 0.125)
    assert counts(presets.pyramid_drop()) == [published.pyramid_count(576, r) for r in ratios]
    assert counts(presets.dart()) == [4 + 8 * published.dart_share(576, 0.778, 8)]
    assert counts(presets.divprune()) == [int(round(0.098 * 576))]
    assert counts(presets.visionzip()) == [54 + 10]
    left, stages = 576, []
    for _ in range(3):
        left = math.ceil(0.7 * left) + 1
        stages.append(left)
    assert counts(presets.evit()) == stages
    assert counts(presets.tome())[:3] == [560, 544, 528]
    assert counts(presets.vscan()) == [96, 32]


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_tower_reduced_twice_is_the_method_twice(name: str) -> None:
    """With the sizes of ToMe as a bias of the second block, and EViT's fused token as a patch."""
    model, eager = tiny.tiny_llava(4), tiny.shared_llava(4, "eager")
    batch = tiny.inputs(model, 2)
    policy = presets.tome(12, 2, 64) if name == "tome" else presets.evit(0.7, (0, 1), 64)
    reduced = transform(model, policy=policy, example_inputs=batch)
    entered: list[Tensor] = []
    after = model.model.language_model.layers[0]
    after.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    reduced(**batch)
    vision = eager.model.vision_tower
    for row in range(2):
        pixels = tiny.row_of(batch, row)["pixel_values"]
        hidden = vision(pixels, output_hidden_states=True).hidden_states[0][0]
        sizes = torch.ones(len(hidden))
        for layer in vision.encoder.layers[:2]:
            hidden, sizes = _tower_step(name, layer, hidden, sizes)
        expected = eager.model.multi_modal_projector(hidden[1:])
        start = int((batch["input_ids"][row] == tiny.IMAGE).nonzero()[0])
        ours = entered[-1][row, start : start + len(expected)]
        assert_close(ours, expected)


def _tower_step(name: str, layer: Any, hidden: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """One block of a CLIP tower with eager attention, and the method after it."""
    seen: list[Tensor] = []
    handle = layer.self_attn.register_forward_hook(lambda *args: seen.append(args[2][1][0]))
    out = layer(hidden[None], attention_mask=sizes.log()[None, None, None])[0]
    handle.remove()
    if name == "evit":
        tokens = torch.cat([out[:1], published.evit(out, seen[0], 0.7).tokens])
        return tokens, torch.ones(len(tokens))
    keys = layer.self_attn.k_proj(layer.layer_norm1(hidden)).unflatten(-1, (4, -1))
    merged = published.tome(out, keys, 12, sizes)
    return merged.tokens, merged.sizes
