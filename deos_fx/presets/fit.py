"""Fit presets to a budget: the largest counts it allows, at the published depth if possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from deos_fx.operator import grid_layout
from deos_fx.policy.counts import ASPECT, tokens_per_layer
from deos_fx.policy.policy import Policy
from deos_fx.presets.decoder import FASTV_LAYER, PYRAMID_KEEP, fastv, pyramid_drop
from deos_fx.presets.projector import avg_pool, merge, redistribute

__all__ = ["FITTED", "fit", "mean_visual_tokens"]

FEWEST = 1 / 32
"""A preset stays at its published layer only if it can keep this share of the tokens there."""


def mean_visual_tokens(policy: Policy, decoder_layers: int, visual_tokens: int) -> float:
    """Compute the mean over the decoder layers of the visual tokens a layer processes, per image.

    Layers 0 to i process the tokens that are there before the site ``decoder.i``; a reduction
    before the decoder shortens all layers.
    """
    return sum(tokens_per_layer(policy, (visual_tokens,), decoder_layers)) / decoder_layers


def fit(name: str, budget_tokens: float, decoder_layers: int, visual_tokens: int) -> Policy:
    """Return a preset with the largest counts that a budget allows.

    A preset inside the decoder stays at its published depth as long as it can keep a 32nd of the
    tokens there; otherwise its first site moves to an earlier layer, down to ``decoder.0``. The
    stages of ``pyramid_drop`` divide the layers after the first stage evenly and keep the
    proportions 4 : 2 : 1. ``avg_pool`` takes windows at most 1.5 times as long as wide.

    Args:
        name: One of ``FITTED``, the presets that a budget determines.
        budget_tokens: Limit on ``mean_visual_tokens``.
        decoder_layers: Layers of the decoder.
        visual_tokens: Visual tokens of an image.

    Raises:
        ValueError: If there is no such preset, or none of its settings meets the budget.
    """
    if name not in FITTED:
        raise ValueError(f"no preset {name!r}; choose from {', '.join(FITTED)}")
    if not budget_tokens >= 1:
        raise ValueError(f"a budget of {budget_tokens:g} visual tokens; give at least 1")
    budget = min(budget_tokens, visual_tokens)
    for policy in FITTED[name](budget, decoder_layers, visual_tokens):
        if mean_visual_tokens(policy, decoder_layers, visual_tokens) <= budget + 1e-9:
            return policy
    raise ValueError(
        f"{name} cannot meet a mean of {budget_tokens:g} visual tokens over {decoder_layers} "
        f"decoder layers: even at its earliest site the layers before it process too many of the "
        f"{visual_tokens}; raise the budget or choose a preset at the projector"
    )


def _fit_fastv(budget: float, layers: int, tokens: int) -> Iterable[Policy]:
    # The mean over L layers of l times all tokens and L - l times the count, solved for the count.
    for layer in range(min(FASTV_LAYER, layers - 1), 0, -1):
        count = _floor((budget * layers - layer * tokens) / (layers - layer))
        if count >= (FEWEST * tokens if layer > 1 else 1):
            yield fastv(layer, count)


def _fit_pyramid_drop(budget: float, layers: int, tokens: int) -> Iterable[Policy]:
    # From the published depth, a quarter of the layers, to the first layer. At the first layer any
    # count is accepted, since there is no better depth to try.
    for first in range(max(round(layers / 4), 1), 0, -1):
        stages = sorted({round(first + s * (layers - first) / 3) for s in range(3)})
        counts = _largest_pyramid(budget, layers, tokens, [n for n in stages if n < layers])
        if counts and (first == 1 or counts[-1] >= FEWEST * tokens):
            yield pyramid_drop([n for n in stages if n < layers], counts)


def _largest_pyramid(budget: float, layers: int, tokens: int, stages: list[int]) -> list[int]:
    """Return counts in the published proportions, as large as the budget allows; empty if none."""
    # Costs grow with the largest count, so the first that is too much ends the search.
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
    # The largest count that splits the grid into nearly square windows; only 1 always does.
    for count in range(_floor(budget), 0, -1):
        try:
            grid_layout(side, side, count, aspect=ASPECT)
        except ValueError:
            continue
        yield avg_pool("projector", count)


def _floor(value: float) -> int:
    """Round down, forgiving the rounding error of a fraction times a count."""
    return math.floor(value + 1e-9)


_Fit = Callable[[float, int, int], Iterable[Policy]]
"""Settings of a preset, best first, for a budget, decoder layers and visual tokens."""

FITTED: Mapping[str, _Fit] = {
    "fastv": _fit_fastv,
    "pyramid_drop": _fit_pyramid_drop,
    "merge": _fit_count(merge),
    "avg_pool": _fit_avg_pool,
    "redistribute": _fit_count(redistribute),
}
