"""Describe reductions in words, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deos_fx.operator.learned import LEARNED
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.shares import write_share
from deos_fx.policy.tier import Tier

_Reduction = Any
"""A `Reduction`, whose file imports this one."""

__all__ = ["in_words"]


def in_words(reduction: _Reduction) -> str:
    """Describe a reduction: what it keeps, how it chooses, and what happens to the rest."""
    keep = write_share(reduction.keep)
    chosen = " then ".join(_tier(tier) for tier in reduction.selection)
    if words := _learned(reduction.learned):
        # Learned scores are those of the first tier, perhaps its only ones.
        chosen = f"{chosen} + {words}" if reduction.scores else f"{reduction.selector} by {words}"
    order = "" if reduction.order == "position" else f" in the order of the {reduction.order}"
    treatment = _treatment(reduction)
    return (
        f"{reduction.site}: keep {keep}, {chosen}{order}, {treatment}, "
        f"positions {reduction.position}"
    )


def _tier(tier: Tier) -> str:
    """Describe a tier: its selector, its scores, and where they are observed."""
    selector = SELECTORS[tier.selector]
    words = tier.selector
    if selector.ranks and tier.scores:
        words += f" by {_mix(tier.scores)}"
    if tier.observe:
        words += f" of {'the next block' if tier.observe == 'next' else tier.observe}"
    return words


def _mix(weights: Mapping[str, float]) -> str:
    """Describe weights by name, such as those of scores."""
    if len(weights) == 1:
        return next(iter(weights))
    return " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())


def _learned(learned: Mapping[str, Tensor]) -> str:
    """Describe the learned scores: what each looks at, and how many directions it has."""
    words = []
    for name, value in learned.items():
        part = LEARNED[name]
        if part.scores:
            ranks = {"quadratic": value.shape[-1] // 2, "text": value.shape[-1]}
            rank = f" (rank {ranks[name]})" if name in ranks else ""
            words.append(f"learned {name} of {part.words}{rank}")
    return " + ".join(words)


def _treatment(reduction: _Reduction) -> str:
    """Describe what happens to dropped tokens."""
    # The regime, and in brackets every setting that differs from its default.
    words = [f"{reduction.regime}"]
    if reduction.gain > 0:
        words.append(f"gain {reduction.gain:.3g}, {_assigned(reduction)}")
        if reduction.assignment != "window" and reduction.temperature != math.inf:
            words[-1] += f" by {_mix(reduction.similarity)}"
    named = {"diversity": 0, "exponent": 1, "reweight": 0, "mass_bias": 0, "weighting": "one"}
    for name, default in (named | {"sharpness": 1}).items():
        value = getattr(reduction, name)
        if value != default:
            words.append(f"{name} {value if isinstance(value, str) else format(value, '.3g')}")
    flags = ("average", "residual", "keep_class")
    words += [name.replace("_", " ") for name in flags if getattr(reduction, name)]
    if reduction.receivers == "last":
        words.append("into the last tier")
    return words[0] + (f" ({', '.join(words[1:])})" if words[1:] else "")


def _assigned(reduction: _Reduction) -> str:
    """Describe which kept tokens take in a dropped one."""
    if reduction.assignment == "k_nearest":
        return f"{reduction.neighbours} nearest"
    if reduction.assignment == "window":
        return "bilinear"
    how = {0: "nearest", math.inf: "uniform"}.get(reduction.temperature)
    return how or f"temperature {reduction.temperature:.3g}"
