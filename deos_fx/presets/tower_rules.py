"""How presets that reduce inside the vision tower are fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.presets import tower
from deos_fx.presets.needs import BLOCKS, EARLIER, PLACES, TOWER
from deos_fx.presets.rule import MERGES, PRUNES, Option, Rule, Values, kept_of
from deos_fx.presets.shape import Shape

__all__ = ["TOWER_RULES", "ranked_in_tower"]


def _last(shape: Shape) -> int:
    return shape.used_blocks - 1


# Scores that need a CLS token.
_OF_CLASS = {"cls_attention", "joint_cls_attention"}


def ranked_in_tower(policy: Policy, shape: Shape) -> Policy:
    """Rank by the attention of all patches where no CLS token attends to them.

    Where the last block has no site, since the features are read from earlier blocks as well, its
    reduction moves to the projector, which observes the same block. Where groups of patches make a
    token, nothing is observed at the projector, and its reduction moves to the last block.
    """
    if shape.in_groups:
        of_groups = (_of_groups(step, shape) for step in policy.reductions)
        return replace(policy, reductions=tuple(of_groups))
    steps = [step if shape.class_token else _by_patches(step) for step in policy.reductions]
    return replace(policy, reductions=tuple(_where_a_site_is(step, shape) for step in steps))


def _where_a_site_is(step: Reduction, shape: Shape) -> Reduction:
    stage, block = split_site(step.site)
    if stage != "vision" or block < shape.tower_sites:
        return step
    # There is a copy of the CLS token in the tower alone, and no block after its last one.
    ends = step.observe == "next" and shape.used_blocks == shape.vision_blocks
    observe = "" if ends else step.observe
    return replace(step, site="projector", keep_class=False, observe=observe)


def _by_patches(step: Reduction, **changes: Any) -> Reduction:
    """Rank by the attention that a token gets from all patches, and not from a CLS token."""

    def scores(given: Mapping[str, float]) -> dict[str, float]:
        return {("mutual_attention" if name in _OF_CLASS else name): w for name, w in given.items()}

    tiers = tuple(replace(tier, scores=scores(tier.scores)) for tier in step.tiers)
    changes |= {"scores": scores(step.scores), "tiers": tiers, "keep_class": False}
    return replace(step, **changes)


def _of_groups(step: Reduction, shape: Shape) -> Reduction:
    """Rank groups of patches by the attention of their own block.

    They stay in the order of the image, and their masses bias no attention.
    """
    site, scores = step.site, (name for tier in step.selection for name in tier.scores)
    if site == "projector" and not _OF_CLASS.isdisjoint(scores):
        site = f"vision.{_last(shape)}"
    if split_site(site)[0] != "vision":
        return step
    own = {"site": site, "observe": "", "order": "position", "mass_bias": 0.0}
    return _by_patches(step, **own)


def _visionzip(shape: Shape, size: float, values: Values) -> Policy:
    # CLS, if there is one, and another token are dominant, and one is a target.
    count = kept_of(size, shape.visual_tokens, least=3)
    contextual = min(count - 2, max(1, round(values["contextual"] * count)))
    policy = tower.visionzip(count - contextual, contextual, _last(shape))
    return ranked_in_tower(policy, shape)


def _before_next(shape: Shape) -> int:
    """Return the block of PruMerge: the attention of the block after it must be there."""
    if shape.in_groups:
        # Case: its own attention is read.
        return _last(shape)
    return min(_last(shape), shape.vision_blocks - 2)


def _neighbours(shape: Shape) -> dict[str, Option]:
    most = max(1, shape.visual_tokens - 1)
    return {"neighbours": Option(min(32, most), 1, min(64, most), logarithmic=True)}


def _prumerge(shape: Shape, size: float, values: Values) -> Policy:
    count = kept_of(size, shape.visual_tokens, least=2)
    policy = tower.prumerge(count, _before_next(shape), values["neighbours"])
    return ranked_in_tower(policy, shape)


def _prumerge_plus(shape: Shape, size: float, values: Values) -> Policy:
    # One token is the extra one.
    count = kept_of(size, shape.visual_tokens, least=3) - 1
    selected = min(count - 1, max(1, round(values["selected"] * count)))
    policy = tower.prumerge_plus(
        selected,
        count - selected,
        shape.visual_tokens,
        _before_next(shape),
        values["neighbours"],
    )
    return ranked_in_tower(policy, shape)


def _vispruner(shape: Shape, size: float, values: Values) -> Policy:
    # Each tier takes one token at least.
    count = kept_of(size, shape.visual_tokens, least=2)
    important = min(max(values["important"], 1 / count), 1 - 1 / count)
    return ranked_in_tower(tower.vispruner(count, important, _last(shape)), shape)


def _hiprune(shape: Shape, size: float, values: Values) -> Policy:
    count = kept_of(size, shape.visual_tokens)
    policy = tower.hiprune(count, values["alpha"], values["object_block"], _last(shape))
    return ranked_in_tower(policy, shape)


def _hiprune_options(shape: Shape) -> dict[str, Option]:
    return {
        "alpha": Option(0.1, 0.0, 1.0),
        "object_block": Option(shape.block_at(9 / 23), 0, max(0, _last(shape))),
    }


def _tome(shape: Shape, size: float, values: Values) -> Policy:
    tokens, blocks = shape.visual_tokens, values["blocks"]
    # A block merges at most half of what is left, so more than half of all never matters.
    merged = math.ceil((1 - size) * tokens / 2 - 1e-9)
    return ranked_in_tower(tower.tome(merged, blocks, tokens, shape.class_token), shape)


def _tome_options(shape: Shape) -> dict[str, Option]:
    return {"blocks": Option(shape.tower_sites, 1, max(1, shape.tower_sites))}


def _evit(shape: Shape, size: float, values: Values) -> Policy:
    # Published: stages after 4, 7 and 10 of 12 blocks. All of them move with the first.
    tokens, ends = shape.visual_tokens, [shape.block_at(n / 12) + 1 for n in (4, 7, 10)]
    ends = sorted({min(shape.tower_sites, end - ends[0] + values["first"]) for end in ends})
    # The fused token is one more, so a stage that should keep all keeps all others but one.
    share = max(size, 1e-6) * (1 - 1 / tokens)
    return ranked_in_tower(tower.evit(share, [end - 1 for end in ends], tokens), shape)


def _evit_options(shape: Shape) -> dict[str, Option]:
    most = max(1, shape.tower_sites)
    return {"first": Option(min(most, shape.block_at(4 / 12) + 1), 1, most)}


TOWER_RULES: Mapping[str, Rule] = {
    "visionzip": Rule(
        _visionzip,
        lambda shape: {"contextual": Option(10 / 64, 0.0, 1.0)},
        needs=(TOWER,),
        nearest=MERGES,
    ),
    "vispruner": Rule(
        _vispruner,
        lambda shape: {"important": Option(0.5, 0.0, 1.0)},
        needs=(TOWER,),
        nearest=PRUNES,
    ),
    "prumerge": Rule(_prumerge, _neighbours, needs=(TOWER,), nearest=MERGES),
    "prumerge_plus": Rule(
        _prumerge_plus,
        lambda shape: {"selected": Option(0.25, 0.0, 1.0)} | _neighbours(shape),
        needs=(TOWER,),
        nearest=MERGES,
    ),
    "hiprune": Rule(_hiprune, _hiprune_options, needs=(TOWER, EARLIER, PLACES), nearest=PRUNES),
    "tome": Rule(_tome, _tome_options, needs=(TOWER, BLOCKS), nearest=MERGES),
    "evit": Rule(_evit, _evit_options, needs=(TOWER, BLOCKS), nearest=("visionzip", "merge")),
}
