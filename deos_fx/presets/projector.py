"""Methods that reduce the features of an image just before they enter the prompt.

After these methods LLaVA numbers the positions of the prompt without gaps.
"""

from __future__ import annotations

from deos_fx import policy
from deos_fx.presets.catalogue import method

__all__ = [
    "avg_pool",
    "bilinear_pool",
    "cdpruner",
    "divprune",
    "holov",
    "merge",
    "random",
    "redistribute",
    "uniform",
    "vscan",
]

_CLS = "a CLS token in the tower (a model without one: its patches)"


@method(
    "Liu et al., CDPruner (NeurIPS 2025); Theia-4869/CDPruner",
    licence="Apache-2.0",
    needs="text in the prompt (the paper: CLIP's text tower)",
)
def cdpruner(keep: int | float = 64) -> policy.Policy:
    """Keep the most diverse set of relevant tokens: greedy MAP of a determinantal process.

    Source: the official code (encode_images). The kernel is r_i cos(x_i, x_j) r_j of the projected
    features, with the relevance r scaled to [0, 1]; the code *negates* the similarity to the text
    before scaling it, which is right for the cosines of CLIP.

    Differences: the official relevance compares CLIP's image tower with CLIP's text tower, which
    the models in transformers do not contain. Here the projected features are compared with the
    model's own embeddings of the words. Relevance is scaled within each image instead of the whole
    batch.

    Args:
        keep: Tokens or fraction kept per image.
    """
    reduction = policy.Reduction(
        "projector",
        keep,
        scores={"text_irrelevance": 1.0},
        selector="determinantal",
        position="compact",
    )
    return policy.Policy((reduction,), name="cdpruner")


@method("Alvar et al., DivPrune (CVPR 2025); vbdi/divprune", licence="CC BY-NC 4.0")
def divprune(keep: int | float = 0.098) -> policy.Policy:
    """Keep the set of tokens that are far from each other: greedy max-min distance.

    Source: the official code (divprune in llava_arch.py). The first token is the one whose nearest
    other token is farthest, by the cosine of the projected features; each further one is the token
    whose nearest kept token is farthest.

    Args:
        keep: Tokens or fraction kept per image.
    """
    reduction = policy.Reduction("projector", keep, selector="max_min", position="compact")
    return policy.Policy((reduction,), name="divprune")


@method("Zou et al., HoloV (NeurIPS 2025); obananas/HoloV", licence="Apache-2.0", needs=_CLS)
def holov(keep: int | float = 64, windows: int = 16) -> policy.Policy:
    """Divide the kept tokens among parts of the image, and fill each part by attention of CLS.

    Source: the official code (llava/model/utils.py). The flat list is cut into 16 runs; each gets
    places in proportion to its mean score and fills them with its best tokens by attention, best
    first. The score also has a term for the variance of similarities; averaged over a run, its
    scaling makes it proportional to the attention, so it drops out here.

    Differences: places for which a run has no tokens go to the best tokens of other runs instead of
    being filled with zero vectors.

    Args:
        keep: Tokens or fraction kept per image.
        windows: Number of runs.
    """
    reduction = policy.Reduction(
        "projector",
        keep,
        selector="quota",
        options={"windows": windows},
        order="selection",
        position="compact",
    )
    return policy.Policy((reduction,), name="holov")


@method(
    "Zhang et al., VScan (2025); Tencent/SelfEvolvingAgent",
    licence="MIT",
    needs=_CLS,
)
def vscan(
    keep: int | float = 96,
    final: int | float = 32,
    layer: int = 16,
    local_block: int = 5,
    windows: int = 16,
) -> policy.Policy:
    """Keep the best of every window and of the image, merge the rest, and prune in the decoder.

    Source: the official code. Half of the tokens are the best of 6 x 6 windows by the attention of
    CLS in an early block, half are the best of the others by that of the last block; every
    remaining token is averaged into the kept one with the most similar projected features. In the
    decoder, tokens are ranked as in PyramidDrop.

    Differences: if the windows' half is not divisible by their number, the official code keeps
    fewer tokens; here the best tokens by score fill the places.

    Args:
        keep: Tokens or fraction kept before the decoder.
        final: Tokens or fraction of the original tokens kept in the decoder.
        layer: Decoder layers before the second stage.
        local_block: Block of the tower whose attention ranks the tokens of a window.
        windows: Number of windows of an image.
    """
    first = policy.Reduction(
        "projector",
        keep,
        selector="windows",
        options={"windows": windows},
        observe=f"vision.{local_block}",
        tiers=(policy.Tier(keep=0.5),),
        gain=1.0,
        position="compact",
    )
    second = policy.Reduction(f"decoder.{layer - 1}", final, observe="next", position="compact")
    return policy.Policy((first, second), name="vscan")


@method(
    "first stage of VScan (2025) with the masses of Token Merging (ICLR 2023)",
    licence="see vscan and tome",
)
def merge(
    site: str = "projector", keep: int | float = 0.5, mass_bias: float = 1.0
) -> policy.Policy:
    """Merge every dropped token into the kept token it resembles most.

    Sources: the first stage of VScan (Tencent/SelfEvolvingAgent: keep by CLS attention, average
    every other token into the kept token of largest cosine), with masses and the bias log(mass) in
    later attention as in Bolya et al., "Token Merging" (ICLR 2023).

    Differences: all kept tokens are the global top-K, and positions are kept: together with
    calibrated attention, the combination that RESTORE (ICML 2026) found best. See `vscan` and
    `tome` for the methods themselves.

    Args:
        site: The site of the merging.
        keep: Tokens or fraction kept per image.
        mass_bias: Factor of the bias log(mass); 0 is without it.
    """
    return policy.Policy(
        (policy.Reduction(site, keep, gain=1.0, mass_bias=mass_bias),), name="merge"
    )


@method(
    "Cai et al., Matryoshka Multimodal Models (ICLR 2025); mu-cai/matryoshka-mm. "
    "Yao et al., DeCo (2024)",
    licence="Apache-2.0",
)
def avg_pool(site: str = "projector", keep: int | float = 0.25) -> policy.Policy:
    """Average tokens over windows of the grid, regardless of image and text.

    Sources: Cai et al., "Matryoshka Multimodal Models" (mu-cai/matryoshka-mm: ``avg_pool2d`` after
    the projector) and Yao et al., "DeCo" (``AdaptiveAvgPool2d`` before it). Both train the model
    with pooling; here it is applied to a model trained without.

    Where the windows divide the grid this is ``avg_pool2d`` exactly. Differences: elsewhere each
    token goes to the nearest window centre, so windows differ by a row or column and, unlike those
    of adaptive pooling, never overlap.

    Args:
        site: The site of the pooling; no other reduction may come before.
        keep: Tokens or fraction kept per image; the count must split the grid into windows.
    """
    reduction = policy.Reduction(
        site, keep, selector="grid", gain=1.0, similarity={"grid": 1.0}, position="compact"
    )
    return policy.Policy((reduction,), name="avg_pool")


@method(
    "get_2dPool of LLaVA-OneVision and LLaVA-NeXT-Video; LLaVA-VL/LLaVA-NeXT",
    licence="Apache-2.0",
)
def bilinear_pool(site: str = "projector", keep: int | float = 0.25) -> policy.Policy:
    """Interpolate bilinearly onto a coarser grid, regardless of image and text.

    Source: the official code (get_2dPool): ``interpolate`` of the grid of features to
    ceil(h / s) x ceil(w / s), without aligned corners. LLaVA-OneVision does this for video frames,
    with s = 2, and is trained with it.

    Args:
        site: The site of the pooling; no other reduction may come before.
        keep: Tokens or fraction kept per image; the count must split the grid into windows.
    """
    reduction = policy.Reduction(
        site, keep, selector="grid", gain=1.0, assignment="window", position="compact"
    )
    return policy.Policy((reduction,), name="bilinear_pool")


@method(
    "the regime of Differentiable Efficient Operator Search (arXiv 2606.05232)",
    licence="no code is public",
)
def redistribute(
    site: str = "projector",
    keep: int | float = 0.5,
    temperature: float = 0.1,
    mass_bias: float = 1.0,
) -> policy.Policy:
    """Spread every dropped token over all kept ones by similarity: soft reweighting.

    This is the regime that "Differentiable Efficient Operator Search" (arXiv 2606.05232) calls
    adaptive reweighting. Only the abstract of that paper is public, so the formula is this
    project's own: weights softmax(cosine / 0.1) over the kept tokens, means by mass, and the bias
    log(mass) in later attention. The nearest published relative with code is the package token of
    SPViT (ECCV 2022), which gathers the dropped tokens, weighted by score, in one extra token.

    Args:
        site: The site of the reduction.
        keep: Tokens or fraction kept per image.
        temperature: Divides the cosines: the smaller, the more goes to the nearest token.
        mass_bias: Factor of the bias log(mass); 0 is without it.
    """
    reduction = policy.Reduction(site, keep, gain=1.0, temperature=temperature, mass_bias=mass_bias)
    return policy.Policy((reduction,), name="redistribute")


@method("a baseline of most papers", licence="-")
def random(keep: int | float = 0.25, seed: int = 0, site: str = "projector") -> policy.Policy:
    """Prune at random: a choice by position and seed, the same for every image.

    Source: the baseline that papers compare with. They draw for every input; here one draw is part
    of the policy, so that its graph is reproducible. Average results over seeds.

    Args:
        keep: Tokens or fraction kept per image.
        seed: Seed of the choice.
        site: The site of the pruning.
    """
    reduction = policy.Reduction(
        site, keep, scores={"random": 1.0}, options={"seed": seed}, position="compact"
    )
    return policy.Policy((reduction,), name="random")


@method("a baseline of most papers", licence="-")
def uniform(keep: int | float = 0.25, site: str = "projector") -> policy.Policy:
    """Prune evenly over the grid, regardless of image and text.

    Source: the baseline that papers compare with; here in the order of dithering (Bayer 1973), so
    that any number of tokens is spread evenly.

    Args:
        keep: Tokens or fraction kept per image.
        site: The site of the pruning.
    """
    reduction = policy.Reduction(site, keep, scores={"grid_coverage": 1.0}, position="compact")
    return policy.Policy((reduction,), name="uniform")
