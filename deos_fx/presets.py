"""Hand-designed methods as policies, and the same methods fitted to a budget.

Every preset is a plain policy of the one operator; lowering and export know nothing of presets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from deos_fx.operator.select import grid_layout
from deos_fx.policy import Policy
from deos_fx.reduction import Reduction, split_site

__all__ = [
    "avg_pool",
    "fastv",
    "fit",
    "mean_visual_tokens",
    "merge",
    "names",
    "pyramid_drop",
    "redistribute",
]

FASTV_LAYER = 2
PYRAMID_KEEP = (0.5, 0.25, 0.125)
FEWEST = 1 / 32
"""A preset stays at its published layer only if it can keep this share of the tokens there."""


def fastv(layer: int = FASTV_LAYER, keep: int | float = 0.5) -> Policy:
    """FastV: prune once, early in the decoder, by the attention of the last text token.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024), official code
    pkunlp-icler/FastV. Before layer K (default 2, half of the tokens) the visual tokens that get
    most attention from the last token in layer K - 1, averaged over heads, are kept in their order
    and with their original positions.

    Differences: the official code takes the attention of the first sample for the whole batch, and
    here every sample has its own; one of its versions prunes again at every decoding step, and
    here, as in its version with a cache, the tokens kept in the prefill stay.

    Args:
        layer: K, counted from 0; the layers before it see all tokens. At least 1.
        keep: Tokens or fraction kept per image.

    Raises:
        ValueError: If ``layer`` is below 1: before the first layer there is no attention.
    """
    if layer < 1:
        raise ValueError(f"layer is {layer}; FastV ranks by the layer before, so give at least 1")
    return _single("fastv", Reduction(f"decoder.{layer - 1}", keep))


def pyramid_drop(
    layers: Sequence[int] = (8, 16, 24), keep: Sequence[int | float] = PYRAMID_KEEP
) -> Policy:
    """PyramidDrop: prune in stages, each time by the attention of the last text token.

    Source: Xing et al., "PyramidDrop" (CVPR 2025), official code Cooperx521/PyramidDrop. After 8,
    16 and 24 of 32 layers a half, a quarter and an eighth of the original tokens are left; after
    each stage positions are renumbered without gaps (``compact``).

    Differences: the official code ranks with queries and keys of the layer after the cut, here it
    is the attention of the layer before it, which has been computed anyway; its query is the last
    token of the instruction, here the last of the prompt; it takes one image per sample.

    Args:
        layers: How many decoder layers come before each stage.
        keep: Tokens or fraction of the original tokens kept at each stage.

    Raises:
        ValueError: If the two differ in length or a stage is before the first layer.
    """
    if len(layers) != len(keep) or min(layers, default=1) < 1:
        raise ValueError(
            f"layers {tuple(layers)} and keep {tuple(keep)} must have one length, layers at least 1"
        )
    stages = zip(layers, keep, strict=True)
    reductions = (Reduction(f"decoder.{n - 1}", k, position="compact") for n, k in stages)
    return Policy(tuple(reductions), name="pyramid_drop")


def merge(site: str = "projector", keep: int | float = 0.5) -> Policy:
    """Merging: every dropped token joins the kept token it resembles most.

    Sources: the first stage of VScan (Tencent/SelfEvolvingAgent: keep by CLS attention, average
    every other token into the kept token of largest cosine), with masses and the bias log(mass) in
    later attention as in Bolya et al., "Token Merging" (ICLR 2023).

    Differences: VScan takes half of its tokens from windows of the image and renumbers positions;
    here all are the global top-K and positions are kept, the combination with calibrated attention
    that RESTORE (ICML 2026) found best. Token Merging pairs alternating tokens inside the vision
    tower; here the targets are the kept tokens.

    Args:
        site: Where to merge.
        keep: Tokens or fraction kept per image.
    """
    return _single("merge", Reduction(site, keep, gain=1.0, mass_bias=1.0))


def avg_pool(site: str = "projector", keep: int | float = 0.5) -> Policy:
    """Average pooling over windows of the grid, whatever the image and the text say.

    Sources: Cai et al., "Matryoshka Multimodal Models" (mu-cai/matryoshka-mm: ``avg_pool2d`` after
    the projector) and Yao et al., "DeCo" (``AdaptiveAvgPool2d`` before it). Both train the model
    with it; here it is applied to a model that was not.

    Where the windows divide the grid this is ``avg_pool2d`` exactly. Elsewhere each token goes to
    the nearest window centre, so windows differ by a row or column and, unlike those of adaptive
    pooling, never overlap. Differences: the pooled tokens keep the positions of the window centres
    instead of being renumbered.

    Args:
        site: Where to pool; no other reduction may come before.
        keep: Tokens or fraction kept per image; the count must split the grid into windows.
    """
    return _single(
        "avg_pool", Reduction(site, keep, selector="grid", gain=1.0, similarity={"grid": 1.0})
    )


def redistribute(site: str = "projector", keep: int | float = 0.5) -> Policy:
    """Soft reweighting: every dropped token is spread over all kept ones by similarity.

    The regime that "Differentiable Efficient Operator Search" (arXiv 2606.05232) calls adaptive
    reweighting. Only the abstract of that paper is public to us, so the formula is ours: weights
    softmax(cosine / 0.1) over the kept tokens, means by mass, and the bias log(mass) in later
    attention. The nearest published relative with code is the package token of SPViT (ECCV 2022),
    which gathers the dropped tokens, weighted by score, in one extra token.

    Args:
        site: Where to reduce.
        keep: Tokens or fraction kept per image.
    """
    return _single("redistribute", Reduction(site, keep, gain=1.0, temperature=0.1, mass_bias=1.0))


def names() -> list[str]:
    """Names of the presets."""
    return list(_FITS)


def mean_visual_tokens(policy: Policy, decoder_layers: int, visual_tokens: int) -> float:
    """Mean over the decoder layers of the visual tokens a layer processes, for one image.

    Layers 0 to i process the tokens that are there before the site ``decoder.i``; a reduction
    before the decoder shortens all layers.
    """
    present, total, layer = visual_tokens, 0, 0
    counts = policy.counts(visual_tokens)
    for reduction, count in zip(policy.reductions, counts, strict=True):
        stage, index = split_site(reduction.site)
        until = index + 1 if stage == "decoder" else 0
        total += (until - layer) * present
        present, layer = count, until
    return (total + (decoder_layers - layer) * present) / decoder_layers


def fit(name: str, budget_tokens: float, decoder_layers: int, visual_tokens: int) -> Policy:
    """A preset with counts as large as a budget allows.

    A preset inside the decoder stays at its published depth as long as it can keep a 32nd of the
    tokens there; otherwise its first site moves to an earlier layer, down to ``decoder.0``. The
    stages of ``pyramid_drop`` divide what follows the first evenly and keep the proportions
    4 : 2 : 1. ``avg_pool`` takes windows at most 1.5 times as long as wide.

    Args:
        name: One of ``names()``.
        budget_tokens: Limit on ``mean_visual_tokens``.
        decoder_layers: Layers of the decoder.
        visual_tokens: Visual tokens of an image.

    Raises:
        ValueError: If there is no such preset, or none of its settings meets the budget.
    """
    if name not in _FITS:
        raise ValueError(f"no preset {name!r}; choose from {', '.join(_FITS)}")
    if not budget_tokens >= 1:
        raise ValueError(f"a budget of {budget_tokens:g} visual tokens; give at least 1")
    budget = min(budget_tokens, visual_tokens)
    for policy in _FITS[name](budget, decoder_layers, visual_tokens):
        if mean_visual_tokens(policy, decoder_layers, visual_tokens) <= budget + 1e-9:
            return policy
    raise ValueError(
        f"{name} cannot meet a mean of {budget_tokens:g} visual tokens over {decoder_layers} "
        f"decoder layers: even at its earliest site the layers before it process too many of the "
        f"{visual_tokens}; raise the budget or choose a preset at the projector"
    )


def _single(name: str, reduction: Reduction) -> Policy:
    return Policy((reduction,), name=name)


def _fit_fastv(budget: float, layers: int, tokens: int) -> Iterable[Policy]:
    for layer in range(min(FASTV_LAYER, layers - 1), 0, -1):
        count = _floor((budget * layers - layer * tokens) / (layers - layer))
        if count >= (FEWEST * tokens if layer > 1 else 1):
            yield fastv(layer, count)


def _fit_pyramid_drop(budget: float, layers: int, tokens: int) -> Iterable[Policy]:
    for first in range(max(round(layers / 4), 1), 0, -1):
        stages = sorted({round(first + s * (layers - first) / 3) for s in range(3)})
        counts = _largest_pyramid(budget, layers, tokens, [n for n in stages if n < layers])
        if counts and (first == 1 or counts[-1] >= FEWEST * tokens):
            yield pyramid_drop([n for n in stages if n < layers], counts)


def _largest_pyramid(budget: float, layers: int, tokens: int, stages: list[int]) -> list[int]:
    """Counts in the published proportions, scaled up as far as the budget allows; or nothing."""
    best: list[int] = []
    for largest in range(1, round(tokens / PYRAMID_KEEP[-1]) + 1):
        scaled = (largest * ratio / PYRAMID_KEEP[0] for ratio in PYRAMID_KEEP)
        counts = [min(max(round(n), 1), tokens) for n in scaled][: len(stages)]
        policy = pyramid_drop(stages, counts)
        if mean_visual_tokens(policy, layers, tokens) > budget + 1e-9:
            break
        best = counts
    return best


def _fit_count(preset: Callable[[str, int], Policy]) -> _Fit:
    def fitted(budget: float, layers: int, tokens: int) -> Iterable[Policy]:
        yield preset("projector", _floor(budget))

    return fitted


def _fit_avg_pool(budget: float, layers: int, tokens: int) -> Iterable[Policy]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"avg_pool is fitted to square grids and {tokens} is not a square; call avg_pool with "
            "a count that splits the grid into windows"
        )
    for count in range(_floor(budget), 0, -1):
        try:
            grid_layout(side, side, count, aspect=1.5)
        except ValueError:
            continue
        yield avg_pool("projector", count)


def _floor(value: float) -> int:
    """Rounds down, forgiving the rounding error of a fraction times a count."""
    return math.floor(value + 1e-9)


_Fit = Callable[[float, int, int], Iterable[Policy]]
"""Settings of a preset, best first, for a budget, decoder layers and visual tokens."""

_FITS: Mapping[str, _Fit] = {
    "fastv": _fit_fastv,
    "pyramid_drop": _fit_pyramid_drop,
    "merge": _fit_count(merge),
    "avg_pool": _fit_avg_pool,
    "redistribute": _fit_count(redistribute),
}
