"""How presets that reduce inside the decoder are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deos_fx.policy.policy import Policy
from deos_fx.presets import decoder
from deos_fx.presets.needs import ATTENTION
from deos_fx.presets.rule import PRUNES, Option, Rule, Values, kept_of, layer_option
from deos_fx.presets.shape import Shape

__all__ = ["DECODER_RULES"]


def _fastv(shape: Shape, size: float, values: Values) -> Policy:
    return decoder.fastv(shape.attending(values["layer"]), kept_of(size, shape.visual_tokens))


def _dart(shape: Shape, size: float, values: Values) -> Policy:
    count = kept_of(size, shape.visual_tokens)
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
    return lambda shape: layer_option(published)(shape) | {"taper": Option(1.0, 0.0, 3.0)}


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
    unable = {*shape.without_attention, *(i - 1 for i in shape.following)}
    able = [i not in unable and i < shape.decoder_sites for i in range(layers)]
    left_before, drops = tokens, []
    for can, count in zip(able, counts, strict=True):
        drops.append(left_before - count if can else 0)
        left_before = count if can else left_before
    return decoder.fitprune(drops, tokens)


def _fitprune_options(shape: Shape) -> dict[str, Option]:
    # The share of the depth is raised to this power: below 1, tokens are dropped earlier.
    return {"early": Option(1.0, 0.2, 2.0, logarithmic=True)}


_FEW = layer_option(2 / 32)

DECODER_RULES: Mapping[str, Rule] = {
    "fastv": Rule(_fastv, _FEW, moves="layer", needs=(ATTENTION,), nearest=PRUNES),
    "pyramid_drop": Rule(
        _pyramid_drop, _staged_options(8 / 32), moves="layer", needs=(ATTENTION,), nearest=PRUNES
    ),
    "sparsevlm_plus": Rule(
        _sparsevlm_plus,
        _staged_options(3 / 32),
        moves="layer",
        needs=(ATTENTION,),
        nearest=PRUNES,
    ),
    "dart": Rule(_dart, _dart_options, moves="layer", needs=(ATTENTION,), nearest=PRUNES),
    "fitprune": Rule(_fitprune, _fitprune_options, needs=(ATTENTION,), nearest=PRUNES),
}
