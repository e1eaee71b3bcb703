"""Methods that reduce inside the vision tower or at its end, by the tower's attention or keys.

``block`` is the last block of the tower whose output the language model uses: block 22 of the 24 of
CLIP ViT-L in LLaVA-1.5. After these methods LLaVA numbers the positions of the prompt without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from deos_fx import policy
from deos_fx.presets.catalogue import method

__all__ = [
    "evit",
    "fastervlm",
    "hiprune",
    "prumerge",
    "prumerge_plus",
    "tome",
    "visionzip",
    "vispruner",
]

LAST_BLOCK = 22
NEIGHBOURS = 32
_CLS = "a CLS token in the tower (a model without one: its patches)"


@method(
    "Yang et al., VisionZip (CVPR 2025); JIA-Lab-research/VisionZip",
    licence="Apache-2.0",
    needs=_CLS,
)
def visionzip(dominant: int = 54, contextual: int = 10, block: int = LAST_BLOCK) -> policy.Policy:
    """Keep the tokens CLS attends to, and merge the others into a few taken at equal steps.

    Source: the official code (visionzip/clip_encoder.py). The dominant tokens are CLS itself and
    the ``dominant`` - 1 patches with most of its attention. Of the rest, every step-th is a target;
    each of the others goes to the target with the most similar key (mean over heads). A target
    becomes itself *plus* the mean of the tokens it got, a vector about twice as long. Dominant
    tokens come first.

    Args:
        dominant: Tokens kept as they are, the CLS token among them.
        contextual: Number of targets.
        block: Last block of the tower that is used.
    """
    reduction = policy.Reduction(
        f"vision.{block}",
        dominant + contextual,
        keep_class=True,
        tiers=(policy.Tier(keep=contextual, selector="strided"),),
        order="tier",
        receivers="last",
        gain=1.0,
        similarity={"key": 1.0},
        exponent=0.0,
        average=True,
        position="compact",
    )
    return policy.Policy((reduction,), name="visionzip")


def _prumerge(
    keep: int | float, block: int, neighbours: int, tiers: tuple[policy.Tier, ...], name: str
) -> policy.Policy:
    reduction = policy.Reduction(
        f"vision.{block}",
        keep,
        scores={"joint_cls_attention": 1.0},
        observe="next",
        tiers=tiers,
        order="selection",
        gain=1.0,
        assignment="k_nearest",
        neighbours=neighbours,
        similarity={"joint_key": 1.0},
        weighting="raw",
        exponent=0.0,
        residual=True,
        position="compact",
    )
    return policy.Policy((reduction,), name=name)


@method(
    "Shang et al., LLaVA-PruMerge (ICCV 2025); 42Shawn/LLaVA-PruMerge",
    licence="Apache-2.0",
    needs=_CLS,
)
def prumerge(
    keep: int | float = 73, block: int = LAST_BLOCK, neighbours: int = NEIGHBOURS
) -> policy.Policy:
    """Keep the tokens CLS attends to, and add to each its neighbours, weighted by attention.

    Source: the official code (token_prune_merge_advanced). Attention is that of the block *after*
    the features, over the full width without splitting heads. To each kept token the 32 others with
    the most similar keys, kept or not, are added with their attention as weight, without dividing;
    one extra token is the sum of all dropped tokens, weighted in the same way. The order is that of
    attention.

    Differences: the official code keeps as many tokens as there are outliers of attention, which
    depends on the image; here the count is fixed (its default without outliers is 1/8 of 576, plus
    the extra token).

    Args:
        keep: Tokens or fraction that come out per image, the extra one included.
        block: Last block of the tower that is used.
        neighbours: Tokens that are added to each kept one.
    """
    return _prumerge(keep, block, neighbours, (), "prumerge")


@method(
    "Shang et al., LLaVA-PruMerge+ (ICCV 2025); 42Shawn/LLaVA-PruMerge",
    licence="Apache-2.0",
    needs=_CLS,
)
def prumerge_plus(
    selected: int = 36,
    spatial: int = 108,
    visual_tokens: int = 576,
    block: int = LAST_BLOCK,
    neighbours: int = NEIGHBOURS,
) -> policy.Policy:
    """Extend PruMerge by additional tokens at equal steps over the image.

    Source: the official code (token_prune_merge_advanced_plus). With the share rho of tokens
    selected by attention, the spatial ones are every int(int(1 / rho) / 3)-th token that is not
    selected already, without the last token of the image.

    Differences: fixed counts, as in `prumerge`; the defaults are those of a rho of 1/16. If there
    are fewer tokens at these steps than asked for, others follow in the order of the image.

    Args:
        selected: Tokens selected by attention.
        spatial: Tokens at equal steps.
        visual_tokens: Tokens of an image before the reduction.
        block: Last block of the tower that is used.
        neighbours: Tokens that are added to each kept one.
    """
    step = max(1, visual_tokens // selected // 3)
    spread = policy.Tier(keep=spatial, selector="lattice", options={"step": step})
    return _prumerge(selected + spatial + 1, block, neighbours, (spread,), "prumerge_plus")


@method(
    "Zhang et al., FasterVLM (2024); Theia-4869/FasterVLM",
    licence="Apache-2.0",
    needs=_CLS,
)
def fastervlm(keep: int | float = 0.25) -> policy.Policy:
    """Prune before the decoder, by the attention of CLS.

    Source: the official code (encode_images): the top T tokens by the attention of CLS, averaged
    over heads, in the block that the features come from; they stay in the order of the image.

    Args:
        keep: Tokens or fraction kept per image.
    """
    return policy.Policy(
        (policy.Reduction("projector", keep, position="compact"),), name="fastervlm"
    )


@method(
    "Zhang et al., VisPruner (ICCV 2025); Theia-4869/VisPruner",
    licence="Apache-2.0",
    needs=_CLS,
)
def vispruner(
    keep: int | float = 128, important: float = 0.5, block: int = LAST_BLOCK
) -> policy.Policy:
    """Keep important tokens by the attention of CLS, and of the others those that are distinct.

    Source: the official code (encode_images). int(T r) tokens are the best by attention. The others
    are listed in the order of attention and repeatedly split into even and odd places; each time
    the 8 even ones that resemble an odd one most are dropped, until T - int(T r) are left.
    Similarity is that of the tower's features before the projector.

    Args:
        keep: T, tokens or fraction kept per image.
        important: r, the share of important tokens.
        block: Last block of the tower that is used.
    """
    distinct = policy.Tier(keep=1.0 - important, selector="distinct")
    reduction = policy.Reduction(f"vision.{block}", keep, tiers=(distinct,), position="compact")
    return policy.Policy((reduction,), name="vispruner")


@method(
    "Liu et al., HiPrune (2025); Danielement321/HiPrune",
    licence="MIT",
)
def hiprune(
    keep: int | float = 192, alpha: float = 0.1, object_block: int = 8, block: int = LAST_BLOCK
) -> policy.Policy:
    """Keep tokens that a middle block attends to, their neighbours, and the last block's choice.

    Source: the official code (encode_images). Tokens are ranked by the attention they get from all
    tokens of the tower, averaged over heads. Anchors are the best round(T alpha / 5) tokens of a
    middle block (the ninth). They are kept with their neighbours in the flat list, one place and
    one row before and after, and the best of the last block fill the rest of T.

    Args:
        keep: T, tokens or fraction kept per image.
        alpha: Share of T for anchors and their neighbours.
        object_block: Block whose attention shows where objects are.
        block: Last block of the tower that is used.
    """
    reduction = policy.Reduction(
        f"vision.{block}",
        keep,
        scores={"mutual_attention": 1.0},
        selector="neighbourhood",
        options={"share": alpha},
        observe=f"vision.{object_block}",
        tiers=(policy.Tier(keep=1.0, scores={"mutual_attention": 1.0}),),
        position="compact",
    )
    return policy.Policy((reduction,), name="hiprune")


@method(
    "Bolya et al., Token Merging (ICLR 2023); facebookresearch/ToMe",
    licence="CC BY-NC 4.0",
)
def tome(
    merged: int = 16,
    blocks: int = LAST_BLOCK + 1,
    visual_tokens: int = 576,
    class_token: bool = True,
) -> policy.Policy:
    """Merge the most similar pairs of tokens after every block of the vision tower.

    Source: the paper, and the official code (tome/merge.py) for its details. Tokens are split into
    alternating halves A and B. The r tokens of A that have the most similar token in B, by the mean
    of the keys over heads, are merged into that token, weighted by the number of patches each
    stands for; attention gets the logarithm of that number as a bias. CLS takes part in the
    alternation, but never merges.

    Differences: the official code merges between attention and MLP of a block; here merging is
    after the block, so a merged token is the mean of two outputs of the MLP instead of the output
    for the mean. Without a class token the official order of A is that of similarity; here it is
    that of the image.

    Args:
        merged: r, tokens merged after each block; at most half of those left.
        blocks: Number of blocks after which tokens are merged, from the first.
        visual_tokens: Tokens of an image before any reduction.
        class_token: Whether the tower has a class token in front.
    """
    reductions, left = [], visual_tokens
    for block in range(blocks):
        left -= min(merged, left // 2)
        reductions.append(
            policy.Reduction(
                f"vision.{block}",
                left,
                selector="bipartite",
                options={"first": int(class_token)},
                order="selection",
                receivers="last",
                gain=1.0,
                similarity={"key": 1.0},
                mass_bias=1.0,
                position="compact",
            )
        )
    return policy.Policy(tuple(reductions), name="tome")


@method(
    "Liang et al., EViT (ICLR 2022); youweiliang/evit",
    licence="Apache-2.0",
    needs=_CLS,
)
def evit(
    keep: float = 0.7, blocks: Sequence[int] = (3, 6, 9), visual_tokens: int = 576
) -> policy.Policy:
    """Prune in the vision tower by the attention of CLS, and fuse dropped tokens into one.

    Source: the official code (evit.py). After blocks 3, 6 and 9 (counted from 0) the ceil(rho n)
    tokens with most attention of CLS, averaged over heads, are kept in that order, and one extra
    token is the sum of the others, each times its attention. Later stages treat it as any token.

    Differences: the official code drops between attention and MLP of a block; here tokens are
    dropped after the block. For kept tokens this is the same; the fused token is a sum of outputs
    of the MLP instead of the output for the sum.

    Args:
        keep: rho, the share of the tokens left that each stage keeps.
        blocks: Blocks after which tokens are dropped.
        visual_tokens: Tokens of an image before any reduction.
    """
    reductions, left = [], visual_tokens
    for block in blocks:
        left = math.ceil(keep * left - 1e-9) + 1
        reductions.append(
            policy.Reduction(
                f"vision.{block}",
                left,
                order="selection",
                weighting="raw",
                exponent=0.0,
                residual=True,
                position="compact",
            )
        )
    return policy.Policy(tuple(reductions), name="evit")
