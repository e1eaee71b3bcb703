"""How presets that reduce before the decoder are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from deos_fx.policy.policy import Policy
from deos_fx.presets import projector, tower
from deos_fx.presets.needs import ATTENTION, EARLIER, PLACES, TOWER, WINDOWS
from deos_fx.presets.rule import MERGES, PRUNES, Option, Rule, Values, kept_of, layer_option
from deos_fx.presets.shape import Shape
from deos_fx.presets.tower_rules import ranked_in_tower

__all__ = ["PROJECTOR_RULES"]


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
    count = kept_of(size, shape.visual_tokens)
    policy = projector.merge(_site(shape, values), count, mass_bias=values.get("mass_bias", 0.0))
    return _ranked_by(policy, shape)


def _redistribute(shape: Shape, size: float, values: Values) -> Policy:
    own = {"mass_bias": 0.0} | {name: values[name] for name in values if name != "layer"}
    count = kept_of(size, shape.visual_tokens)
    return _ranked_by(projector.redistribute(_site(shape, values), count, **own), shape)


def _any_layer(shape: Shape) -> dict[str, Option]:
    options = {"layer": Option(0, 0, shape.decoder_layers - 1)}
    # Where layers choose keys by an index, masses cannot bias attention.
    return options | ({} if shape.indexing else {"mass_bias": Option(1.0, 0.0, 1.0)})


def _redistribute_options(shape: Shape) -> dict[str, Option]:
    return _any_layer(shape) | {"temperature": Option(0.1, 0.01, 1.0, logarithmic=True)}


def _counted(preset: Callable[..., Policy], *given: str) -> Callable[..., Policy]:
    """Make the rule of a preset that takes a count, and the options of these names."""

    def build(shape: Shape, size: float, values: Values) -> Policy:
        own = {name: values[name] for name in given}
        return ranked_in_tower(preset(keep=kept_of(size, shape.visual_tokens), **own), shape)

    return build


def _pooled(preset: Callable[..., Policy]) -> Callable[..., Policy]:
    def build(shape: Shape, size: float, values: Values) -> Policy:
        return preset(keep=shape.windows(kept_of(size, shape.visual_tokens)))

    return build


def _holov_options(shape: Shape) -> dict[str, Option]:
    tokens = shape.visual_tokens
    return {"windows": Option(min(16, tokens), 1, min(64, tokens), logarithmic=True)}


def _vscan(shape: Shape, size: float, values: Values) -> Policy:
    tokens = shape.visual_tokens
    final = values["final"]
    # At the full size, the second stage keeps everything, too. Each half of the first has a token.
    keep = kept_of(size / final, tokens, least=2)
    policy = projector.vscan(
        keep=keep,
        final=min(keep, kept_of(size, tokens)),
        layer=shape.attending(values["layer"], following=True),
        local_block=values["local_block"],
        windows=shape.windows(16, even=True),
    )
    return ranked_in_tower(policy, shape)


def _vscan_options(shape: Shape) -> dict[str, Option]:
    return layer_option(16 / 32)(shape) | {
        "final": Option(1 / 3, 0.05, 1.0),
        "local_block": Option(shape.block_at(6 / 23), 0, max(0, shape.used_blocks - 1)),
    }


PROJECTOR_RULES: Mapping[str, Rule] = {
    "merge": Rule(_merge, _any_layer),
    "redistribute": Rule(_redistribute, _redistribute_options),
    "avg_pool": Rule(_pooled(projector.avg_pool), needs=(WINDOWS,), nearest=MERGES),
    "bilinear_pool": Rule(_pooled(projector.bilinear_pool), needs=(WINDOWS,), nearest=MERGES),
    "cdpruner": Rule(_counted(projector.cdpruner)),
    "divprune": Rule(_counted(projector.divprune)),
    "fastervlm": Rule(_counted(tower.fastervlm), needs=(TOWER,), nearest=PRUNES),
    "holov": Rule(
        _counted(projector.holov, "windows"), _holov_options, needs=(TOWER,), nearest=PRUNES
    ),
    "random": Rule(
        _counted(projector.random, "seed"),
        lambda shape: {"seed": Option(0, 0, 10**9, tuned=False)},
    ),
    "uniform": Rule(_counted(projector.uniform), needs=(PLACES,), nearest=("random",)),
    "vscan": Rule(_vscan, _vscan_options, needs=(TOWER, EARLIER, ATTENTION), nearest=MERGES),
}
