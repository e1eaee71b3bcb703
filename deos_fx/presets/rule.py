"""What it takes to fit a preset: a rule, with the ranges of its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from deos_fx.policy.policy import Policy
from deos_fx.presets.needs import Need
from deos_fx.presets.shape import Shape

__all__ = ["MERGES", "PRUNES", "Option", "Rule", "Values", "kept_of", "layer_option"]

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


# What comes nearest to a method that a model cannot run.
PRUNES = ("divprune",)
MERGES = ("merge",)


def kept_of(size: float, tokens: int, least: int = 1) -> int:
    """Return the tokens that a size keeps: 0 as few as `least`, and 1 all."""
    # A fraction times a count may be an ulp below a whole number.
    return min(tokens, max(least, math.floor(size * tokens + 1e-9)))


def layer_option(published: float) -> Callable[[Shape], dict[str, Option]]:
    """Return the option ``layer``: the decoder layers before the first reduction."""

    def options(shape: Shape) -> dict[str, Option]:
        return {
            "layer": Option(shape.layers_before(published), 1, max(1, shape.decoder_layers - 1))
        }

    return options
