"""Say how each preset is fitted to a model and a budget, and which of its options can be tuned.

Depths are kept in proportion: layer 2 of 32 becomes layer 1 of 10, and a preset of the vision tower
ends at the block whose output the language model uses. That is block 22 of the 24 of CLIP ViT-L in
LLaVA-1.5, and the last one in a model that uses the last. What a method ranks by is replaced where
the model lacks it, as long as the method stays itself; otherwise the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.presets import decoder, projector, tower
from deos_fx.presets.needs import ATTENTION, BLOCKS, PLACES, TOWER, WINDOWS, Need
from deos_fx.presets.shape import Shape

__all__ = ["RULES", "Option", "Rule"]

Values: TypeAlias = Mapping[str, Any]
"""A value for each option."""


@dataclass(frozen=True)
class Option:
    """One option of a preset: its published value, in proportion to the model, and its range.

    Attributes:
        published: The published value; a whole number if the option takes whole numbers alone.
        low: The smallest value.
        high: The largest value.
        logarithmic: Whether ratios matter and not differences.
        tuned: Whether `tune` tries other values; a seed is given instead.
    """

    published: int | float
    low: int | float
    high: int | float
    logarithmic: bool = False
    tuned: bool = True


@dataclass(frozen=True)
class Rule:
    """How a preset is fitted.

    Attributes:
        build: Makes the policy for a model, a size and options. Counts grow with the size: 0 keeps
            as little as the method can, and 1 everything.
        options: Returns the options for a model.
        moves: The option that says where the first reduction is, if the budget may ask for an
            earlier place.
        needs: What it needs of a model.
        nearest: Presets that come nearest to it, for models that lack what it needs.
    """

    build: Callable[[Shape, float, Values], Policy]
    options: Callable[[Shape], dict[str, Option]] = lambda shape: {}
    moves: str = ""
    needs: tuple[Need, ...] = ()
    nearest: tuple[str, ...] = ()


def _floor(size: float, tokens: int, least: int = 1) -> int:
    # A fraction times a count may be an ulp below a whole number.
    return min(tokens, max(least, math.floor(size * tokens + 1e-9)))


# *** in the decoder ***


def _layer(published: float) -> Callable[[Shape], dict[str, Option]]:
    """Return the option ``layer``: the decoder layers before the first reduction."""

    def options(shape: Shape) -> dict[str, Option]:
        return {
            "layer": Option(shape.layers_before(published), 1, max(1, shape.decoder_layers - 1))
        }

    return options


_FEW = _layer(2 / 32)


def _fastv(shape: Shape, size: float, values: Values) -> Policy:
    return decoder.fastv(shape.attending(values["layer"]), _floor(size, shape.visual_tokens))


def _dart(shape: Shape, size: float, values: Values) -> Policy:
    count = _floor(size, shape.visual_tokens)
    # No more pivots than places.
    image_pivots = min(values["image_pivots"], count)
    layer = shape.attending(values["layer"])
    return decoder.dart(layer, count, image_pivots, values["text_pivots"])


def _dart_options(shape: Shape) -> dict[str, Option]:
    pivots = {"image_pivots": Option(4, 1, 16), "text_pivots": Option(4, 0, 8)}
    return _FEW(shape) | pivots


def _pyramid_drop(shape: Shape, size: float, values: Values) -> Policy:
    # The stages divide the layers after the first one evenly.
    layers, first = shape.decoder_layers, values["layer"]
    places = [round(first + i * (layers - first) / 3) for i in range(3)]
    before = [_nearest(shape, place, following=True) for place in places]
    return _staged(decoder.pyramid_drop, before, decoder.PYRAMID_KEEP, shape, size, values)


def _sparsevlm_plus(shape: Shape, size: float, values: Values) -> Policy:
    # The published stages see 3, 7 and 16 of 32 layers before them; the later ones keep their share
    # of the layers after the first.
    layers, first = shape.decoder_layers, values["layer"]
    places = [round(first + share * (layers - first)) for share in (0, 4 / 29, 13 / 29)]
    before = [_nearest(shape, place) for place in places]

    def preset(layers: list[int], counts: list[int]) -> Policy:
        return decoder.sparsevlm_plus([layer - 1 for layer in layers], counts)

    return _staged(preset, before, decoder.SPARSE_KEEP, shape, size, values)


def _nearest(shape: Shape, before: int, following: bool = False) -> int:
    """Move a stage to the nearest site that has its scores; one past all sites stays out."""
    return before if before > shape.decoder_sites else shape.attending(before, following=following)


def _staged(
    preset: Callable[[list[int], list[int]], Policy],
    before: list[int],
    published: tuple[int | float, ...],
    shape: Shape,
    size: float,
    values: Values,
) -> Policy:
    """Make a preset of several stages, whose counts keep the published proportions."""
    tokens = shape.visual_tokens
    # With a taper of 0 all stages keep as many; with 2, the ratios between them are squared.
    shares = [(keep / published[0]) ** values["taper"] for keep in published]
    # At the full size, the last stage keeps all tokens, too.
    counts = [min(tokens, max(1, round(size * tokens * x / shares[-1]))) for x in shares]
    # Few layers leave no room for all stages: of two at one place, the later one acts.
    last = shape.decoder_sites
    stages = {n: count for n, count in zip(before, counts, strict=True) if n <= last}
    return preset([*stages], [*stages.values()])


def _staged_options(published: float) -> Callable[[Shape], dict[str, Option]]:
    return lambda shape: _layer(published)(shape) | {"taper": Option(1.0, 0.0, 3.0)}


def _fitprune(shape: Shape, size: float, values: Values) -> Policy:
    # 1. The published schedule as the share of tokens left along the depth, a line between layers.
    tokens, layers = shape.visual_tokens, shape.decoder_layers
    published = decoder.FITPRUNE_DROPS
    left = [1 - sum(published[:i]) / 576 for i in range(len(published) + 1)]

    def share(depth: float) -> float:
        place = depth ** values["early"] * (len(left) - 1)
        i = min(int(place), len(left) - 2)
        return left[i] + (place - i) * (left[i + 1] - left[i])

    # 2. A power of it: 0 keeps everything, and the larger, the fewer tokens stay.
    power = 1 / max(size, 1e-3) - 1
    counts = [max(1, round(tokens * share((i + 1) / layers) ** power)) for i in range(layers)]
    # 3. Layers without a site, or without attention, leave their drops to the next one that can.
    able = [i not in shape.without_attention and i < shape.decoder_sites for i in range(layers)]
    left_before, drops = tokens, []
    for can, count in zip(able, counts, strict=True):
        drops.append(left_before - count if can else 0)
        left_before = count if can else left_before
    return decoder.fitprune(drops, tokens)


def _fitprune_options(shape: Shape) -> dict[str, Option]:
    # The share of the depth is raised to this power: below 1, tokens are dropped earlier.
    return {"early": Option(1.0, 0.2, 2.0, logarithmic=True)}


# *** before the decoder ***


def _site(shape: Shape, values: Values) -> str:
    layer = values["layer"]
    return f"decoder.{shape.attending(layer) - 1}" if layer else "projector"


def _ranked_by(policy: Policy, shape: Shape) -> Policy:
    """Rank by novelty where there is no CLS token, as the default policy of `transform` does."""
    if shape.class_token:
        return policy
    (step,) = policy.reductions
    if step.site != "projector":
        return policy
    return replace(policy, reductions=(replace(step, scores={"novelty": 1.0}),))


def _merge(shape: Shape, size: float, values: Values) -> Policy:
    count = _floor(size, shape.visual_tokens)
    policy = projector.merge(_site(shape, values), count, mass_bias=values["mass_bias"])
    return _ranked_by(policy, shape)


def _redistribute(shape: Shape, size: float, values: Values) -> Policy:
    own = {name: values[name] for name in ("temperature", "mass_bias")}
    count = _floor(size, shape.visual_tokens)
    return _ranked_by(projector.redistribute(_site(shape, values), count, **own), shape)


def _any_layer(shape: Shape) -> dict[str, Option]:
    return {"layer": Option(0, 0, shape.decoder_layers - 1), "mass_bias": Option(1.0, 0.0, 1.0)}


def _redistribute_options(shape: Shape) -> dict[str, Option]:
    return _any_layer(shape) | {"temperature": Option(0.1, 0.01, 1.0, logarithmic=True)}


def _counted(preset: Callable[..., Policy], *given: str) -> Callable[..., Policy]:
    """Make the rule of a preset that takes a count, and the options of these names."""

    def build(shape: Shape, size: float, values: Values) -> Policy:
        own = {name: values[name] for name in given}
        return _ranked_in_tower(preset(keep=_floor(size, shape.visual_tokens), **own), shape)

    return build


def _pooled(preset: Callable[..., Policy]) -> Callable[..., Policy]:
    def build(shape: Shape, size: float, values: Values) -> Policy:
        return preset(keep=shape.windows(_floor(size, shape.visual_tokens)))

    return build


def _holov_options(shape: Shape) -> dict[str, Option]:
    tokens = shape.visual_tokens
    return {"windows": Option(min(16, tokens), 1, min(64, tokens), logarithmic=True)}


def _vscan(shape: Shape, size: float, values: Values) -> Policy:
    tokens = shape.visual_tokens
    final = values["final"]
    # At the full size, the second stage keeps everything, too. Each half of the first has a token.
    keep = _floor(size / final, tokens, least=2)
    policy = projector.vscan(
        keep=keep,
        final=min(keep, _floor(size, tokens)),
        layer=shape.attending(values["layer"], following=True),
        local_block=values["local_block"],
        windows=shape.windows(16, even=True),
    )
    return _ranked_in_tower(policy, shape)


def _vscan_options(shape: Shape) -> dict[str, Option]:
    return _layer(16 / 32)(shape) | {
        "final": Option(1 / 3, 0.05, 1.0),
        "local_block": Option(shape.block_at(6 / 23), 0, max(0, shape.used_blocks - 1)),
    }


# *** in the vision tower ***


def _last(shape: Shape) -> int:
    return shape.used_blocks - 1


# Scores that need a CLS token.
_OF_CLASS = {"cls_attention", "joint_cls_attention"}


def _ranked_in_tower(policy: Policy, shape: Shape) -> Policy:
    """Rank by the attention of all patches where no CLS token attends to them.

    Where the last block has no site, since the features are read from earlier blocks as well, its
    reduction moves to the projector, which observes the same block.
    """
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


def _by_patches(step: Reduction) -> Reduction:
    """Rank by the attention that a token gets from all patches, and not from a CLS token."""

    def scores(given: Mapping[str, float]) -> dict[str, float]:
        return {("mutual_attention" if name in _OF_CLASS else name): w for name, w in given.items()}

    tiers = tuple(replace(tier, scores=scores(tier.scores)) for tier in step.tiers)
    return replace(step, scores=scores(step.scores), tiers=tiers, keep_class=False)


def _visionzip(shape: Shape, size: float, values: Values) -> Policy:
    # CLS, if there is one, and another token are dominant, and one is a target.
    count = _floor(size, shape.visual_tokens, least=3)
    contextual = min(count - 2, max(1, round(values["contextual"] * count)))
    policy = tower.visionzip(count - contextual, contextual, _last(shape))
    return _ranked_in_tower(policy, shape)


def _before_next(shape: Shape) -> int:
    """Return the block of PruMerge: the attention of the block after it must be there."""
    return min(_last(shape), shape.vision_blocks - 2)


def _neighbours(shape: Shape) -> dict[str, Option]:
    most = max(1, shape.visual_tokens - 1)
    return {"neighbours": Option(min(32, most), 1, min(64, most), logarithmic=True)}


def _prumerge(shape: Shape, size: float, values: Values) -> Policy:
    count = _floor(size, shape.visual_tokens, least=2)
    policy = tower.prumerge(count, _before_next(shape), values["neighbours"])
    return _ranked_in_tower(policy, shape)


def _prumerge_plus(shape: Shape, size: float, values: Values) -> Policy:
    # One token is the extra one.
    count = _floor(size, shape.visual_tokens, least=3) - 1
    selected = min(count - 1, max(1, round(values["selected"] * count)))
    policy = tower.prumerge_plus(
        selected,
        count - selected,
        shape.visual_tokens,
        _before_next(shape),
        values["neighbours"],
    )
    return _ranked_in_tower(policy, shape)


def _vispruner(shape: Shape, size: float, values: Values) -> Policy:
    # Each tier takes one token at least.
    count = _floor(size, shape.visual_tokens, least=2)
    important = min(max(values["important"], 1 / count), 1 - 1 / count)
    return _ranked_in_tower(tower.vispruner(count, important, _last(shape)), shape)


def _hiprune(shape: Shape, size: float, values: Values) -> Policy:
    count = _floor(size, shape.visual_tokens)
    policy = tower.hiprune(count, values["alpha"], values["object_block"], _last(shape))
    return _ranked_in_tower(policy, shape)


def _hiprune_options(shape: Shape) -> dict[str, Option]:
    return {
        "alpha": Option(0.1, 0.0, 1.0),
        "object_block": Option(shape.block_at(9 / 23), 0, max(0, _last(shape))),
    }


def _tome(shape: Shape, size: float, values: Values) -> Policy:
    tokens, blocks = shape.visual_tokens, values["blocks"]
    # A block merges at most half of what is left, so more than half of all never matters.
    merged = math.ceil((1 - size) * tokens / 2 - 1e-9)
    return tower.tome(merged, blocks, tokens, shape.class_token)


def _tome_options(shape: Shape) -> dict[str, Option]:
    return {"blocks": Option(shape.tower_sites, 1, max(1, shape.tower_sites))}


def _evit(shape: Shape, size: float, values: Values) -> Policy:
    # Published: stages after 4, 7 and 10 of 12 blocks. All of them move with the first.
    tokens, ends = shape.visual_tokens, [shape.block_at(n / 12) + 1 for n in (4, 7, 10)]
    ends = sorted({min(shape.tower_sites, end - ends[0] + values["first"]) for end in ends})
    # The fused token is one more, so a stage that should keep all keeps all others but one.
    share = max(size, 1e-6) * (1 - 1 / tokens)
    return _ranked_in_tower(tower.evit(share, [end - 1 for end in ends], tokens), shape)


def _evit_options(shape: Shape) -> dict[str, Option]:
    most = max(1, shape.tower_sites)
    return {"first": Option(min(most, shape.block_at(4 / 12) + 1), 1, most)}


# *** all of them ***

_PRUNES = ("divprune",)
_MERGES = ("merge",)

RULES: Mapping[str, Rule] = {
    # In the decoder.
    "fastv": Rule(_fastv, _FEW, moves="layer", needs=(ATTENTION,), nearest=_PRUNES),
    "pyramid_drop": Rule(
        _pyramid_drop, _staged_options(8 / 32), moves="layer", needs=(ATTENTION,), nearest=_PRUNES
    ),
    "sparsevlm_plus": Rule(
        _sparsevlm_plus,
        _staged_options(3 / 32),
        moves="layer",
        needs=(ATTENTION,),
        nearest=_PRUNES,
    ),
    "dart": Rule(_dart, _dart_options, moves="layer", needs=(ATTENTION,), nearest=_PRUNES),
    "fitprune": Rule(_fitprune, _fitprune_options, needs=(ATTENTION,), nearest=_PRUNES),
    # Before it.
    "merge": Rule(_merge, _any_layer),
    "redistribute": Rule(_redistribute, _redistribute_options),
    "avg_pool": Rule(_pooled(projector.avg_pool), needs=(WINDOWS,), nearest=_MERGES),
    "bilinear_pool": Rule(_pooled(projector.bilinear_pool), needs=(WINDOWS,), nearest=_MERGES),
    "cdpruner": Rule(_counted(projector.cdpruner)),
    "divprune": Rule(_counted(projector.divprune)),
    "fastervlm": Rule(_counted(tower.fastervlm), needs=(TOWER,), nearest=_PRUNES),
    "holov": Rule(
        _counted(projector.holov, "windows"), _holov_options, needs=(TOWER,), nearest=_PRUNES
    ),
    "random": Rule(
        _counted(projector.random, "seed"),
        lambda shape: {"seed": Option(0, 0, 10**9, tuned=False)},
    ),
    "uniform": Rule(_counted(projector.uniform), needs=(PLACES,), nearest=("random",)),
    "vscan": Rule(_vscan, _vscan_options, needs=(TOWER,), nearest=_MERGES),
    # In the vision tower.
    "visionzip": Rule(
        _visionzip,
        lambda shape: {"contextual": Option(10 / 64, 0.0, 1.0)},
        needs=(TOWER,),
        nearest=_MERGES,
    ),
    "vispruner": Rule(
        _vispruner,
        lambda shape: {"important": Option(0.5, 0.0, 1.0)},
        needs=(TOWER,),
        nearest=_PRUNES,
    ),
    "prumerge": Rule(_prumerge, _neighbours, needs=(TOWER,), nearest=_MERGES),
    "prumerge_plus": Rule(
        _prumerge_plus,
        lambda shape: {"selected": Option(0.25, 0.0, 1.0)} | _neighbours(shape),
        needs=(TOWER,),
        nearest=_MERGES,
    ),
    "hiprune": Rule(_hiprune, _hiprune_options, needs=(TOWER,), nearest=_PRUNES),
    "tome": Rule(_tome, _tome_options, needs=(TOWER, BLOCKS), nearest=_MERGES),
    "evit": Rule(_evit, _evit_options, needs=(TOWER, BLOCKS), nearest=("visionzip", "merge")),
}
