"""The published methods, each written straight from its formula, for one sample.

Nothing here comes from deos_fx. Every function takes the raw quantities that the official code of
the method reads (attention weights per head, queries, keys, hidden states), not derived features,
and returns the visual tokens in the official order. A docstring names the repository and commit
that the formula was checked against and lists what is odd about it.

Layers and blocks count from 0. A sequence has L tokens of which ``visual``, a range of positions,
are those of one image; N is the number of visual tokens or patches, d the hidden size, H the heads.
Ties: ``topk`` leaves their order open; here the first wins, as in ``argmax``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Reduced(NamedTuple):
    """What is left of an image.

    Attributes:
        tokens: [K, d].
        kept: Where each token stood; -1 for one that stands for no patch.
    """

    tokens: Tensor
    kept: list[int]


def descending(values: Tensor) -> list[int]:
    """Indices by falling value."""
    return sorted(range(len(values)), key=values.tolist().__getitem__, reverse=True)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine [len(a), len(b)] of every row of a with every row of b."""
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T


def _sorted_rows(hidden: Tensor, kept: Sequence[int]) -> Reduced:
    kept = sorted(kept)
    return Reduced(hidden[kept], kept)


# In the language model


def fastv(hidden: Tensor, attention: Tensor, visual: range, ratio: float) -> Reduced:
    """FastV: the tokens that the last token of the prompt attends to most.

    pkunlp-icler/FastV @ d165972. Before layer k, so after layer k - 1, whose attention decides:
    s_j = mean over heads of A[h, last, j]. The share ``ratio`` goes. Count: Python's ``round``
    (halves to even) of N (1 - ratio). Image order, positions kept.

    Args:
        hidden: [L, d] out of layer k - 1.
        attention: [H, L, L] of layer k - 1.
        visual: Positions of the image.
        ratio: R.
    """
    score = attention.mean(dim=0)[-1, visual.start : visual.stop]
    best = descending(score)[: round(len(visual) * (1 - ratio))]
    return _sorted_rows(hidden[visual.start : visual.stop], best)


def pyramid_drop(
    hidden: Tensor, queries: Tensor, keys: Tensor, visual: range, keep: int
) -> Reduced:
    """PyramidDrop, one stage; also the second stage of VScan.

    Cooperx521/PyramidDrop @ 6444f30 and Tencent/SelfEvolvingAgent @ a82450e. Behind layer i, with
    queries and keys that layer i + 1 makes of *all* tokens that are there (its norm, projections
    and rotary embedding, before anything is dropped). One query, the last token of the instruction;
    softmax over the whole sequence; mean over heads. Image order; positions are renumbered.
    Counts: ``pyramid_count``; VScan's are min(count, N).

    Args:
        hidden: [L, d] out of layer i.
        queries: [H, L, D] of layer i + 1.
        keys: [G, L, D] of layer i + 1, G dividing H (grouped queries).
        visual: Positions of the image.
        keep: Tokens left.
    """
    share = len(queries) // len(keys)
    total = torch.zeros(hidden.shape[0])
    for head, query in enumerate(queries[:, -1]):
        logits = keys[head // share] @ query / math.sqrt(keys.shape[-1])
        total = total + logits.softmax(dim=0)
    score = (total / len(queries))[visual.start : visual.stop]
    return _sorted_rows(hidden[visual.start : visual.stop], descending(score)[:keep])


def pyramid_count(tokens: int, ratio: float) -> int:
    """``int(N * ratio)``, always of the original N: rounded down."""
    return int(tokens * ratio)


def sparsevlm_raters(embeddings: Tensor, visual: range) -> list[int]:
    """SparseVLM's rater tokens, counted from the first text token after the image.

    Gumpest/SparseVLMs @ 26a5f48. On the inputs of layer 0: m_t = mean over visual v of softmax over
    text t of (H_v . H_t), unscaled. Raters are the text tokens with m_t above the mean of m. Only
    text *after* the image takes part. Found once and used at every layer.
    """
    text = embeddings[visual.stop :]
    rated = torch.stack([(text @ v).softmax(dim=0) for v in embeddings[visual.start : visual.stop]])
    mean = rated.mean(dim=0)
    return [t for t in range(len(text)) if mean[t] > mean.mean()]


def sparsevlm_plus(
    hidden: Tensor,
    attention: Tensor,
    raters: Sequence[int],
    positions: Sequence[int],
    frequencies: Tensor,
    visual: range,
    keep: int,
    heads: int = 14,
) -> Reduced:
    """SparseVLM+ (version 2), one layer.

    Gumpest/SparseVLMs @ 26a5f48 with USE_VERSION=2_0, at the outputs of layers 2, 6 and 15, with
    the attention A of that layer. Odd: A, *after* its softmax, is divided by the dot product of two
    vectors of ones that went through the rotary embedding and / sqrt(D): g = 2 / sqrt(D) times the
    sum over frequencies of cos((p_i - p_j) f), which may be negative. Of the quotients, the
    ``heads`` heads (14 of 32) with the largest sum over rater rows and visual columns; the mean
    over these heads and over raters is the score. Kept: ``min(keep, N - 1)``, never all. Image
    order, positions kept, nothing merged.

    Args:
        hidden: [L, d] out of the layer.
        attention: [H, L, L] of the layer.
        raters: See ``sparsevlm_raters``.
        positions: Of all L tokens, the original ones.
        frequencies: [D / 2], of the rotary embedding.
        visual: Positions of the image.
        keep: The listed count of this layer.
        heads: How many heads count.
    """
    size = 2 * len(frequencies)
    rows = torch.zeros(len(attention), len(raters), len(visual))
    for r, rater in enumerate(raters):
        for v, column in enumerate(visual):
            row = visual.stop + rater
            distance = positions[row] - positions[column]
            gravity = 2 * (distance * frequencies).cos().sum() / math.sqrt(size)
            rows[:, r, v] = attention[:, row, column] / gravity
    chosen = descending(rows.sum(dim=(1, 2)))[:heads]
    score = rows[chosen].mean(dim=(0, 1))
    best = descending(score)[: min(keep, len(visual) - 1)]
    return _sorted_rows(hidden[visual.start : visual.stop], best)


def fitprune(hidden: Tensor, attention: Tensor, visual: range, drop: int) -> Reduced:
    """FitPrune at inference, one layer, given how many tokens that layer drops.

    ywh187/FitPrune @ d28e418. With B = *max* over heads of the layer's attention: cross_j = sum of
    B[i, j] over all rows i after the image, self_j = mean of B[i, j] over visual rows i. The
    ``drop`` tokens with the smallest *product* cross_j self_j go, between attention and MLP of the
    layer, which gives what dropping them at its output gives. Image order, positions kept.
    """
    cross, own = _fitprune_scores(attention, visual)
    kept = descending(cross * own)[: len(visual) - drop]
    return _sorted_rows(hidden[visual.start : visual.stop], kept)


def _fitprune_scores(attention: Tensor, visual: range) -> tuple[Tensor, Tensor]:
    strongest = attention.amax(dim=0)[:, visual.start : visual.stop]
    cross = sum(strongest[i] for i in range(visual.stop, len(strongest)))
    return cross, sum(strongest[i] for i in visual) / len(visual)


def fitprune_drops(
    attention: Tensor, visual: range, full_cross: float, full_self: float, alpha: float
) -> list[int]:
    """What FitPrune's fitting drops of one sample in one layer; its schedule counts these.

    Of each of cross (here mean over the rows after the image) and self, sorted ascending, as many
    as leave the sum above (1 - alpha) times what the *unpruned* model had in this layer, less one:
    with i the first number of dropped tokens that falls below, max(i - 1, 0). Dropped is the
    intersection of the two. alpha is bisected in [0, 1], to 0.01, until the FLOPs are met; the
    layer's count is the sum over samples divided by their number, rounded down.
    """
    cross, own = _fitprune_scores(attention, visual)
    dropped = []
    for values, full in ((cross / (len(attention[0]) - visual.stop), full_cross), (own, full_self)):
        order = sorted(range(len(values)), key=values.tolist().__getitem__)
        left = [float(values.sum() - values[order[:i]].sum()) for i in range(len(order))]
        below = [i for i, rest in enumerate(left) if rest < full * (1 - alpha)]
        # Official code leaves this open when no i falls below; then all but one are candidates.
        dropped.append(set(order[: max((below or [len(order)])[0] - 1, 0)]))
    return sorted(dropped[0] & dropped[1])


def dart_share(tokens: int, ratio: float, pivots: int) -> int:
    """What each pivot keeps: ``int(N * (1 - ratio) / pivots)``."""
    return int(tokens * (1 - ratio) / pivots)


def dart(
    hidden: Tensor,
    normed: Tensor,
    keys: Tensor,
    visual: range,
    share: int,
    image_pivots: int = 4,
    text_pivots: int = 4,
    order: Literal["set", "position", "norm"] = "set",
) -> Reduced:
    """DART: for every pivot, the tokens that are least like it.

    Checked against ModelTC/LightCompress @ 9701d035 (llmc/compression/token_reduction/dart.py); the
    official repository is not stored. Before layer k (default 2), with the cached, so rotated, keys
    of layer k - 1, heads side by side. Image pivots are the tokens with the largest L1 norm of
    the key, text pivots the same among the text *after* the image. Each pivot in turn keeps the
    ``share`` tokens of least cosine, on hidden states after the model's *final* norm, among those
    nobody holds yet. Image pivots are kept too, so image_pivots + pivots * share come out. Odd: the
    turn of the pivots is the iteration order of a Python set of absolute positions ("set"); "norm"
    (image pivots by falling norm, then text pivots) and "position" are our deterministic readings.
    Image order, positions kept.

    Args:
        hidden: [L, d] out of layer k - 1.
        normed: [L, d] the same after the final norm.
        keys: [G, L, D].
        visual: Positions of the image.
        share: See ``dart_share``.
        image_pivots: How many.
        text_pivots: How many.
        order: Whose turn it is.
    """
    norm = keys.abs().sum(dim=(0, 2))
    images = [visual[i] for i in descending(norm[visual.start : visual.stop])[:image_pivots]]
    texts = [visual.stop + i for i in descending(norm[visual.stop :])[:text_pivots]]
    pivots = images + texts
    turns = {"set": list(set(pivots)), "position": sorted(pivots), "norm": pivots}[order]
    held, free = list(images), [p for p in visual if p not in images]
    for pivot in turns:
        like = cosines(normed[[pivot]], normed[free])[0]
        taken = [free[i] for i in descending(-like)[:share]]
        held += taken
        free = [p for p in free if p not in taken]
    return _sorted_rows(hidden[visual.start : visual.stop], [p - visual.start for p in held])


# Between the vision tower and the language model


def fastervlm(features: Tensor, attention: Tensor, keep: int) -> Reduced:
    """FasterVLM: the patches that CLS attends to most.

    Theia-4869/FasterVLM @ f5d5f12. Mean over heads, of the block the features come from (LLaVA:
    the last but one). Dropped after the projector. Image order.

    Args:
        features: [N, d].
        attention: [H, 1 + N, 1 + N], CLS first.
        keep: T.
    """
    return _sorted_rows(features, descending(_class_row(attention))[:keep])


def _class_row(attention: Tensor) -> Tensor:
    """Attention [N] that CLS pays to patches, mean over heads, not normalised again."""
    return attention[:, 0, 1:].mean(dim=0)


def visionzip(
    hidden: Tensor, keys: Tensor, attention: Tensor, dominant: int, contextual: int
) -> Reduced:
    """VisionZip: CLS and the dominant patches, then contextual ones that take in the rest.

    JIA-Lab-research/VisionZip @ 3151f6d, all of one block, the last but one. ``dominant`` includes
    CLS: only dominant - 1 patches are picked, by the *sum* over heads of the CLS row. Of the n
    patches left, in image order, every max(1, n // contextual)-th is a target, the first
    ``contextual`` of them; each other one goes to the target of largest cosine, on keys averaged
    over heads. Odd: target + mean of what it received, so about twice the norm (nothing is added
    where nothing was received). Order: CLS, dominant in image order, targets in image order.

    Args:
        hidden: [1 + N, d], CLS first.
        keys: [1 + N, H, D], with the bias.
        attention: [H, 1 + N, 1 + N].
        dominant: Tokens picked, CLS included.
        contextual: Tokens merged.
    """
    patches, metric = hidden[1:], keys[1:].mean(dim=1)
    best = sorted(descending(attention[:, 0, 1:].sum(dim=0))[: dominant - 1])
    rest = [j for j in range(len(patches)) if j not in best]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    received: dict[int, list[int]] = {i: [] for i in targets}
    for j in rest:
        if j not in targets:
            like = cosines(metric[[j]], metric[targets])[0]
            received[targets[int(like.argmax())]].append(j)
    rows = [hidden[0], *patches[best]]
    for i in targets:
        rows.append(patches[i] + patches[received[i]].sum(dim=0) / max(1, len(received[i])))
    return Reduced(torch.stack(rows), [-1, *best, *targets])


def prumerge(
    features: Tensor, queries: Tensor, keys: Tensor, keep: int, neighbours: int = 32
) -> Reduced:
    """LLaVA-PruMerge with a fixed count.

    42Shawn/LLaVA-PruMerge @ 097c041 (``token_prune_merge_advanced``). Queries and keys of the
    *last* block, features those that go *into* it. Odd: the attention of CLS is softmax over all
    1 + N tokens of q k^T / sqrt(d) on the full width, without heads. Every kept i becomes
    x_i + sum of a_j x_j over the 32 tokens of most alike key among all others, kept or not, with
    the original x_j and without a division. Order: falling attention, then one token more, the sum
    of a_j x_j over what was not kept. So keep + 1 come out; officially keep is ``int(N * ratio)``
    with the ratio of outliers of the attention.

    Args:
        features: [N, d] patches.
        queries: [1 + N, d], heads side by side, with the bias, not scaled.
        keys: [1 + N, d].
        keep: T.
        neighbours: How many join a kept token.
    """
    attention = _joint_class_row(queries, keys)
    return _prumerge(features, keys[1:], attention, descending(attention)[:keep], neighbours)


def prumerge_plus(
    features: Tensor,
    queries: Tensor,
    keys: Tensor,
    keep: int,
    spatial: int | None = None,
    neighbours: int = 32,
) -> Reduced:
    """LLaVA-PruMerge+ with a fixed count: kept tokens of an even spacing join those of attention.

    42Shawn/LLaVA-PruMerge @ 097c041 (``token_prune_merge_advanced_plus``, adaptive path): with
    ratio = keep / N and step = int(1 / ratio), the positions 0, s, 2 s ... below N - 1 (the last
    patch never) with s = int(step / 3), where not kept already. Behind the others, ascending; then
    everything as in ``prumerge``. How many they are depends on the image; that only the first
    ``spatial`` join is our reading of a fixed count.
    """
    attention = _joint_class_row(queries, keys)
    best = descending(attention)[:keep]
    spacing = int(int(len(features) / keep) / 3)
    even = [j for j in range(0, len(features) - 1, spacing) if j not in best][:spatial]
    return _prumerge(features, keys[1:], attention, best + even, neighbours)


def _joint_class_row(queries: Tensor, keys: Tensor) -> Tensor:
    return (keys @ queries[0] / math.sqrt(keys.shape[-1])).softmax(dim=0)[1:]


def _prumerge(
    features: Tensor, keys: Tensor, attention: Tensor, kept: list[int], neighbours: int
) -> Reduced:
    rows = []
    for i in kept:
        like = cosines(keys[[i]], keys)[0]
        near = [j for j in descending(like) if j != i][:neighbours]
        rows.append(features[i] + sum(attention[j] * features[j] for j in near))
    rest = [attention[j] * features[j] for j in range(len(features)) if j not in kept]
    rows.append(torch.stack(rest).sum(dim=0) if rest else torch.zeros_like(features[0]))
    return Reduced(torch.stack(rows), [*kept, -1])


def vispruner(features: Tensor, attention: Tensor, keep: int, important: float = 0.5) -> Reduced:
    """VisPruner: important patches by attention, then diverse ones by dropping near duplicates.

    Theia-4869/VisPruner @ aefa01a. int(keep * important) by the mean CLS attention of the block
    the features come from. The others, in *falling attention*, are thinned in rounds: split into
    even and odd places of the list, drop the r = min(8, surplus) even ones with the largest cosine
    to any odd one. Odd: the next list is the surviving even ones by *falling* cosine, then the odd
    ones. The official code needs an even list and 8 tokens to drop in a half of it: it fails for
    N - int(keep * important) odd, and for a few diverse tokens. Cosine on features before the
    projector. Image order.

    Args:
        features: [N, d] out of the vision tower.
        attention: [H, 1 + N, 1 + N].
        keep: T.
        important: Share of T taken by attention.
    """
    order = descending(_class_row(attention))
    first = int(keep * important)
    chosen, rest = order[:first], order[first:]
    diverse = keep - first
    while diverse and len(rest) > diverse:
        even, odd = rest[::2], rest[1::2]
        surplus = min(8, len(rest) - diverse)
        assert surplus <= len(even) == len(odd), "the official code fails here"
        nearest = cosines(features[even], features[odd]).amax(dim=1)
        rest = [even[i] for i in descending(nearest)[surplus:]] + odd
    return _sorted_rows(features, chosen + (rest if diverse else []))


def cdpruner(features: Tensor, patch_embeds: Tensor, text_embeds: Tensor, keep: int) -> Reduced:
    """CDPruner: greedy MAP of a determinantal point process, conditioned on the question.

    Theia-4869/CDPruner @ 9541616. S: cosine of projected features. Relevance of patch i: *minus*
    the mean over text embeddings of their cosine, (r - min + 1e-6) / (max - min) (officially over
    the batch; here, as for a batch of one, over the image). L_ij = r_i S_ij r_j. Each step takes
    the largest conditional variance, which Cholesky steps update. Text embeddings are those of
    CLIP's text tower, one per 77 words, patch embeddings go through CLIP's projection. Image order.

    Args:
        features: [N, d] after the projector.
        patch_embeds: [N, e].
        text_embeds: [M, e].
        keep: T.
    """
    relevance = -cosines(patch_embeds, text_embeds).mean(dim=1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * cosines(features, features) * relevance[None, :]
    return _sorted_rows(features, determinantal(kernel, keep))


def determinantal(kernel: Tensor, keep: int) -> list[int]:
    """Indices in the order in which greedy MAP picks them."""
    variance = kernel.diagonal().clone()
    chosen: list[int] = []
    factors: list[Tensor] = []
    for _ in range(keep):
        j = int(variance.argmax())
        explained = sum((c[j] * c for c in factors), torch.zeros_like(variance))
        factor = (kernel[j] - explained) / variance[j].sqrt()
        variance = variance - factor**2
        chosen.append(j)
        factors.append(factor)
        variance[chosen] = -math.inf
    return chosen


def divprune(features: Tensor, ratio: float) -> Reduced:
    """DivPrune: greedy max-min diversity.

    vbdi/divprune @ 799e2d9. Distance 1 - cosine of the embeddings that enter the language model.
    First the token whose nearest other is farthest (officially the second smallest distance of its
    column, its own being the smallest), then always the one farthest from the nearest of those
    chosen. Count: ``int(round(ratio * N))``. Image order.
    """
    return _sorted_rows(features, max_min(features, int(round(ratio * len(features)))))


def max_min(features: Tensor, keep: int) -> list[int]:
    """Indices in the order in which max-min diversity picks them."""
    distance = 1 - cosines(features, features)
    chosen: list[int] = []
    for _ in range(keep):
        if chosen:
            score = [min(float(distance[i, j]) for i in chosen) for j in range(len(features))]
        else:
            score = [float(column.sort().values[1]) for column in distance.T]
        score = [-math.inf if j in chosen else s for j, s in enumerate(score)]
        chosen.append(max(range(len(features)), key=score.__getitem__))
    return chosen


def hiprune(
    features: Tensor, shallow: Tensor, deep: Tensor, width: int, keep: int, alpha: float = 0.1
) -> Reduced:
    """HiPrune: anchors, the buffers around them, and registers.

    Danielement321/HiPrune @ 6e83a12. g_j = mean over heads and over *all* queries, CLS included, of
    the attention that patch j receives. Anchors: the round(keep * alpha / 5) largest g of the
    object layer (the ninth, block 8). Buffers: the four neighbours of each, as index -1, +1,
    -width, +width, clamped to [0, N - 1] - odd: across the ends of rows, and outside neighbours
    above and below become the first and the last patch. Registers: the largest g of the last but
    one block, among the others, until there are ``keep``. Image order.

    Args:
        features: [N, d].
        shallow: [H, 1 + N, 1 + N] of the object layer.
        deep: [H, 1 + N, 1 + N] of the block the features come from.
        width: Patches in a row.
        keep: T.
        alpha: Share of anchors and buffers.
    """
    last = len(features) - 1
    received = [a.mean(dim=(0, 1))[1:] for a in (shallow, deep)]
    held: set[int] = set()
    for anchor in descending(received[0])[: round(keep * alpha / 5)]:
        steps = (0, -1, 1, -width, width)
        held.update(min(max(anchor + step, 0), last) for step in steps)
    registers = [j for j in descending(received[1]) if j not in held]
    return _sorted_rows(features, [*held, *registers[: keep - len(held)]])


def holov(features: Tensor, attention: Tensor, keep: int, windows: int = 16) -> Reduced:
    """HoloV: a quota for every stretch of the token list, filled by attention.

    obananas/HoloV @ 1d2e65e (llava/model/utils.py). Contiguous windows of the flat list, the first
    N % windows one longer. Token score: 1000 a_j + 0.09 v_j c, v_j the variance of the cosines to
    the other tokens of the window (the zero put on its own place counts in, over n - 1) and
    c = mean |1000 a| / (mean |v| + 1e-6); so the mean over the window, its weight, is 1.09 * 1000
    times the mean attention but for that 1e-6. Quota: floor(keep * weight / (sum + 1e-6)), the rest
    one each to the heaviest windows. Inside, by attention alone. Order: window by window, falling
    attention inside; a window that is kept whole stays in place. What exceeds a window's length
    is lost and made up by rows of zeros at the end (kept: -1).

    Args:
        features: [N, d] after the projector.
        attention: [H, 1 + N, 1 + N] of the block they come from.
        keep: T.
        windows: How many.
    """
    received = _class_row(attention)
    parts = holov_windows(len(features), windows)
    weights = []
    for part in parts:
        scaled = received[part.start : part.stop] * 1000
        if len(part) == 1:
            weights.append(float(scaled) / 1000)
            continue
        x = features[part.start : part.stop]
        x = x / (x.norm(dim=1, keepdim=True) + 1e-6)
        variance = []
        for i in range(len(part)):
            like = x @ x[i]
            like[i] = 0
            mean = like.sum() / (len(part) - 1)
            variance.append(((like - mean) ** 2).sum() / (len(part) - 1))
        spread = torch.stack(variance)
        scale = scaled.abs().mean() / (spread.abs().mean() + 1e-6)
        weights.append(float((scaled + 0.09 * spread * scale).mean()))
    kept = []
    for part, quota in zip(parts, holov_quotas(weights, keep), strict=True):
        if quota >= len(part):
            kept += list(part)
        else:
            kept += [part[i] for i in descending(received[part.start : part.stop])[:quota]]
    rows = [features[i] for i in kept]
    rows += [torch.zeros_like(features[0])] * (keep - len(kept))
    return Reduced(torch.stack(rows), kept + [-1] * (keep - len(kept)))


def holov_windows(tokens: int, windows: int) -> list[range]:
    """Contiguous windows, the longer ones first."""
    sizes = [tokens // windows + (p < tokens % windows) for p in range(windows)]
    return [range(sum(sizes[:p]), sum(sizes[: p + 1])) for p in range(windows) if sizes[p]]


def holov_quotas(weights: Sequence[float], keep: int) -> list[int]:
    """Quotas that sum to ``keep``: rounded down, the rest one each to the largest."""
    share = torch.tensor(weights) / (torch.tensor(weights).sum() + 1e-6)
    quotas = [math.floor(float(part)) for part in share * keep]
    for i in descending(share)[: keep - sum(quotas)]:
        quotas[i] += 1
    return quotas


def vscan(
    features: Tensor, shallow: Tensor, deep: Tensor, width: int, keep: int, side: int = 6
) -> Reduced:
    """VScan, first stage: local and global tokens, and every other one merged into them.

    Tencent/SelfEvolvingAgent @ a82450e (VScan). Local: from each window of side x side patches the
    int(keep / 2) // windows with the largest CLS attention of block 5. Global: keep - int(keep / 2)
    with the largest CLS attention of the last but one block among the others. Odd: where the
    windows do not divide int(keep / 2), fewer than ``keep`` come out. Every other token joins the
    kept one of largest cosine, on projected features; each group becomes its mean. Image order.
    The second stage is ``pyramid_drop`` after layer 15.

    Args:
        features: [N, d] after the projector.
        shallow: [H, 1 + N, 1 + N] of block 5.
        deep: [H, 1 + N, 1 + N] of the block the features come from.
        width: Patches in a row.
        keep: T.
        side: Of a window.
    """
    near, far = _class_row(shallow), _class_row(deep)
    corners = [
        row * width + column
        for row in range(0, len(features) // width, side)
        for column in range(0, width, side)
    ]
    local: list[int] = []
    for corner in corners:
        window = [corner + r * width + c for r in range(side) for c in range(side)]
        local += [window[i] for i in descending(near[window])[: int(keep / 2) // len(corners)]]
    others = [j for j in descending(far) if j not in local]
    kept = sorted(local + others[: keep - int(keep / 2)])
    groups: dict[int, list[int]] = {i: [i] for i in kept}
    for j in range(len(features)):
        if j not in groups:
            groups[kept[int(cosines(features[[j]], features[kept])[0].argmax())]].append(j)
    return Reduced(torch.stack([features[group].mean(dim=0) for group in groups.values()]), kept)


def avg_pool(features: Tensor, width: int, stride: int) -> Reduced:
    """Matryoshka Multimodal Models (M3): mean over windows of the grid, row by row.

    mu-cai/matryoshka-mm @ f6aada8: ``avg_pool2d`` after the projector, stride
    ``avg_pool_stride``; rows and columns that do not fill a window are lost.
    """
    height = len(features) // width
    rows, kept = [], []
    for top in range(0, height - stride + 1, stride):
        for left in range(0, width - stride + 1, stride):
            window = [(top + r) * width + left + c for r in range(stride) for c in range(stride)]
            rows.append(features[window].mean(dim=0))
            kept.append(-1)
    return Reduced(torch.stack(rows), kept)


def avg_pool_stride(tokens: int, keep: int) -> int:
    """``int(sqrt(N / keep))``: 24, 8, 4, 2, 1 for M3's scales 1, 9, 36, 144, 576 of 576."""
    return int(math.sqrt(tokens / keep))


def bilinear_pool(features: Tensor, width: int, stride: int) -> Reduced:
    """LLaVA-OneVision: the grid, shrunk by bilinear interpolation after the projector.

    LLaVA-VL/LLaVA-NeXT (``get_2dPool``): to ceil(h / stride) x ceil(w / stride) cells,
    ``align_corners=False``, without anti-aliasing. In stride 2 that is the mean of 2 x 2; in
    stride 4 it reads only the middle four of sixteen.
    """
    height = len(features) // width
    size = (math.ceil(height / stride), math.ceil(width / stride))
    image = features.T.reshape(1, -1, height, width)
    small = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return Reduced(small[0].flatten(1).T, [-1] * (size[0] * size[1]))


# In the vision tower


class Merged(NamedTuple):
    """What ToMe leaves of a sequence.

    Attributes:
        tokens: [n - r, d].
        sizes: [n - r].
        groups: The positions each token stands for, its own first.
    """

    tokens: Tensor
    sizes: Tensor
    groups: list[list[int]]


def tome(
    hidden: Tensor, keys: Tensor, merged: int, sizes: Tensor | None = None, class_token: bool = True
) -> Merged:
    """ToMe: bipartite soft matching, one block.

    facebookresearch/ToMe @ af95e4b (tome/merge.py). A: even positions of the *whole* sequence, B:
    odd ones; with CLS at position 0, A holds CLS and every second patch beginning with the second.
    Each of A finds the most alike of B, by cosine of keys averaged over heads; the r most alike
    pairs merge, means weighted by size. CLS does not merge. r is at most half of the tokens but
    CLS. Order: the rest of A, then B; A in sequence order with a class token and by falling
    similarity without. Between attention and MLP; later attention adds log(size) to its logits.

    Args:
        hidden: [n, d], after the attention.
        keys: [n, H, D] of that attention.
        merged: r.
        sizes: [n]; ones if None.
        class_token: Whether the sequence begins with CLS.
    """
    sizes = torch.ones(len(hidden)) if sizes is None else sizes
    merged = min(merged, (len(hidden) - class_token) // 2)
    metric = keys.mean(dim=1)
    ours, theirs = list(range(0, len(hidden), 2)), list(range(1, len(hidden), 2))
    best, target = cosines(metric[ours], metric[theirs]).max(dim=1)
    if class_token:
        best[0] = -math.inf
    order = descending(best)
    stay = sorted(order[merged:]) if class_token else order[merged:]
    groups = [[ours[a]] for a in stay] + [[b] for b in theirs]
    for a in order[:merged]:
        groups[len(stay) + int(target[a])].append(ours[a])
    weights = [sizes[group] for group in groups]
    rows = [w @ hidden[g] / w.sum() for w, g in zip(weights, groups, strict=True)]
    return Merged(torch.stack(rows), torch.stack([w.sum() for w in weights]), groups)


def evit(hidden: Tensor, attention: Tensor, rate: float, fuse: bool = True) -> Reduced:
    """EViT, one block.

    youweiliang/evit @ 5ca95a7. Behind blocks 3, 6 and 9, between attention and MLP, by the CLS
    attention of the same block, mean over heads. Kept: ``ceil(rate * n)`` of the n tokens but CLS,
    in *falling attention*. The fused token is the sum of a_j x_j over the others, not divided, and
    comes last; in later blocks it counts and competes as a patch. CLS, which stays first, is not
    part of what is returned.

    Args:
        hidden: [1 + n, d], after the attention.
        attention: [H, 1 + n, 1 + n].
        rate: Of tokens kept.
        fuse: Whether the others are fused.
    """
    patches, received = hidden[1:], _class_row(attention)
    order = descending(received)
    count = math.ceil(rate * len(patches))
    kept, others = order[:count], order[count:]
    if not fuse or not others:
        return Reduced(patches[kept], kept)
    fused = sum(received[j] * patches[j] for j in others)
    return Reduced(torch.cat([patches[kept], fused[None]]), [*kept, -1])
