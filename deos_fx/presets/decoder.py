"""Methods that drop visual tokens inside the language model."""

from __future__ import annotations

from collections.abc import Sequence

from deos_fx import policy
from deos_fx.presets.catalogue import method
from deos_fx.words import counted

__all__ = ["dart", "fastv", "fitprune", "pyramid_drop", "sparsevlm_plus"]

PYRAMID_KEEP = (0.5, 0.25, 0.125)
SPARSE_LAYERS = (2, 6, 15)
SPARSE_KEEP = (300, 200, 118)

# Tokens dropped after each layer of LLaVA-1.5-7B at 60 % fewer FLOPs, as found by the method.
FITPRUNE_DROPS = (
    *(14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4),
    *(26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
)


@method(
    "Chen et al., An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024); pkunlp-icler/FastV",
    licence="none",
)
def fastv(layer: int = 2, keep: int | float = 0.5) -> policy.Policy:
    """Prune once, early in the decoder, by the attention of the last text token.

    Source: the official code pkunlp-icler/FastV. Before layer K (default 2, half of the tokens) the
    visual tokens that get most attention from the last token in layer K - 1, averaged over heads,
    are kept in their order and with their original positions.

    Differences: the official code takes the attention of the first sample for the whole batch; here
    every sample has its own. One of its versions prunes again at every decoding step; here, as in
    its version with a cache, the tokens kept in the prefill stay.

    Args:
        layer: K, counted from 0; the layers before it see all tokens. At least 1.
        keep: Tokens or fraction kept per image.

    Raises:
        ValueError: If ``layer`` is below 1: before the first layer there is no attention.
    """
    if layer < 1:
        raise ValueError(f"layer is {layer}; FastV ranks by the layer before, so give at least 1")
    return policy.Policy((policy.Reduction(f"decoder.{layer - 1}", keep),), name="fastv")


@method(
    "Xing et al., PyramidDrop (CVPR 2025); Cooperx521/PyramidDrop",
    licence="MIT",
)
def pyramid_drop(
    layers: Sequence[int] = (8, 16, 24), keep: Sequence[int | float] = PYRAMID_KEEP
) -> policy.Policy:
    """Prune in stages, by the attention the last text token would pay in the next layer.

    Source: the official code Cooperx521/PyramidDrop. After 8, 16 and 24 of 32 layers a half, a
    quarter and an eighth of the original tokens are left, ranked with the queries and keys of the
    layer after the reduction; after each stage positions are renumbered without gaps.

    Differences: the official code takes one image per sample, and rounds its counts down; here a
    fraction is rounded to the nearest count.

    Args:
        layers: Number of decoder layers before each stage.
        keep: Tokens or fraction of the original tokens kept at each stage.

    Raises:
        ValueError: If the two differ in length or a stage is before the first layer.
    """
    stages = _stages(layers, keep, before=1)
    reductions = (
        policy.Reduction(f"decoder.{n - 1}", k, observe="next", position="compact")
        for n, k in stages
    )
    return policy.Policy(tuple(reductions), name="pyramid_drop")


@method(
    "Zhang et al., SparseVLM (ICML 2025), version 2 of the code; Gumpest/SparseVLMs",
    licence="Apache-2.0",
    needs="rotary positions",
)
def sparsevlm_plus(
    layers: Sequence[int] = SPARSE_LAYERS, keep: Sequence[int | float] = SPARSE_KEEP
) -> policy.Policy:
    """Prune in stages, by the attention of the words that relate to the image most.

    Source: the official code Gumpest/SparseVLMs, version 2_0. Raters are the text tokens after the
    image whose share of the image's attention, mean_v softmax_t(H_v H_t), is above average. At
    layers 2, 6 and 15 visual tokens are ranked by the mean attention of the raters, divided by the
    attention that rotary positions alone give (the product of rotated vectors of ones), in the 14
    heads that attend to the image most. The defaults are its counts for an average of 192 tokens.

    Differences: the official code takes one sample at a time and always drops at least one token.
    SparseVLM itself (version 1.5) is not a preset: it merges part of what it drops into clusters
    whose number depends on the input and whose ties are broken by random noise.

    Args:
        layers: Decoder layers after which tokens are dropped.
        keep: Tokens or fraction of the original tokens kept after each of these.

    Raises:
        ValueError: If the two differ in length or a layer is negative.
    """
    reductions = (
        policy.Reduction(f"decoder.{n}", k, scores={"calibrated_rater_attention": 1.0})
        for n, k in _stages(layers, keep, before=0)
    )
    return policy.Policy(tuple(reductions), name="sparsevlm_plus")


@method(
    "Ye et al., Fit and Prune (AAAI 2025); ywh187/FitPrune",
    licence="Apache-2.0 (as LLaVA)",
)
def fitprune(drops: Sequence[int] = FITPRUNE_DROPS, visual_tokens: int = 576) -> policy.Policy:
    """Drop a few tokens after every layer, by a schedule fitted to statistics.

    Source: the official code ywh187/FitPrune. A layer drops the tokens with the lowest product of
    the attention they get from the text after the image and from the visual tokens, each the
    largest over heads. The method's search found the schedule offline for LLaVA-1.5-7B; give your
    own for another model, or let ``deos_fx.search`` find one.

    Differences: drops after the last layer have no effect and are left out.

    Args:
        drops: Tokens dropped after each decoder layer.
        visual_tokens: Tokens of an image before any reduction.

    Raises:
        ValueError: If more tokens are dropped than there are.
    """
    if sum(drops) >= visual_tokens or min(drops, default=0) < 0:
        raise ValueError(
            f"the schedule drops {sum(drops)} of {counted(visual_tokens, 'token')}; give counts "
            "from 0 on that leave some"
        )
    reductions, left = [], visual_tokens
    for layer, count in enumerate(drops[:-1]):
        left -= count
        if count:
            scores = {"agreed_attention": 1.0}
            reductions.append(policy.Reduction(f"decoder.{layer}", left, scores=scores))
    return policy.Policy(tuple(reductions), name="fitprune")


@method(
    "Wen et al., Stop Looking for Important Tokens (DART, EMNLP 2025); ZichenWen1/DART",
    licence="not stated",
)
def dart(
    layer: int = 2, keep: int | float = 124, image_pivots: int = 4, text_pivots: int = 4
) -> policy.Policy:
    """Keep the tokens that resemble a few pivot tokens least, without attention weights.

    Source: the paper and the port in ModelTC/LightCompress. Pivots are the visual tokens, and the
    text tokens after the image, with the largest L1 norm of the keys of layer K - 1. The visual
    pivots are kept, and every pivot in turn keeps an equal share of the others: those with the
    smallest cosine to it, of hidden states after the final norm. Positions are kept.

    Differences: the official code visits the pivots in the order of a Python set; here visual ones
    come first, each kind in the order of the prompt. The official code keeps
    4 + 8 * int(N (1 - R) / 8) tokens; the default is that count for 576 tokens and R = 77.8 %. The
    L1 norm of a rotated key depends on its position, so give ``position_ids`` with a padded batch,
    as ``generate`` does, if each sample must keep the tokens that it keeps alone.

    Args:
        layer: K, counted from 0. At least 1.
        keep: Tokens or fraction kept per image.
        image_pivots: Number of visual pivots.
        text_pivots: Number of text pivots.

    Raises:
        ValueError: If ``layer`` is below 1.
    """
    if layer < 1:
        raise ValueError(f"layer is {layer}; DART reads the keys of the layer before: at least 1")
    reduction = policy.Reduction(
        f"decoder.{layer - 1}",
        keep,
        selector="probe",
        scores={"key_l1_norm": 1.0},
        options={"image_pivots": image_pivots, "text_pivots": text_pivots},
    )
    return policy.Policy((reduction,), name="dart")


def _stages(
    layers: Sequence[int], keep: Sequence[int | float], before: int
) -> list[tuple[int, int | float]]:
    if len(layers) != len(keep) or min(layers, default=before) < before:
        raise ValueError(
            f"layers {tuple(layers)} and keep {tuple(keep)} must have one length, layers at least "
            f"{before}"
        )
    return list(zip(layers, keep, strict=True))
