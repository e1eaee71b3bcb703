"""Checks of the fields of reductions and tiers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS, WHOLE_NUMBERS
from deos_fx.policy.site import split_site

__all__ = [
    "Options",
    "check_diversity",
    "check_fields",
    "check_keep",
    "check_number",
    "check_observe",
    "known_options",
    "normal_weights",
    "other_options",
]

Options: TypeAlias = dict[str, float | tuple[float, ...]]
"""Parameters of a selector and of scores, by name."""


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Check that a value is a number within limits, and not infinite."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not low <= cast(float, value) <= high or value == math.inf:
        raise ValueError(f"{name} is {value!r}; give a number in [{low:g}, {high:g}]")


def check_fields(values: Mapping[str, Any], known: set[str], needed: set[str], what: str) -> None:
    """Check the names of fields that were read from a file.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    for missing in sorted(needed - set(values)):
        raise ValueError(f"{what} lacks the field {missing!r}")
    for unknown in sorted(set(values) - known):
        raise ValueError(f"{what} has no field {unknown!r}; the fields are {sorted(known)}")


def check_keep(what: str, keep: object) -> None:
    """Check that a value is a number of tokens or a fraction."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep >= 0:
        raise ValueError(f"{what}: keep is {keep!r}; give a count >= 1 or a fraction")
    if isinstance(keep, float) and keep > 1:
        raise ValueError(
            f"{what}: keep is {keep!r}; a float is a fraction in (0, 1], for a number of tokens "
            f"give an int"
        )


def normal_weights(what: str, weights: object, known: Mapping[str, object]) -> dict[str, float]:
    """Return weights that sum to 1, without those that are 0."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{what} is {weights!r}; give a weight for each name")
    for key, weight in weights.items():
        if key not in known:
            name = what.rpartition(" ")[2]
            raise ValueError(
                f"{what.partition(':')[0]}: no {name} {key!r}; choose from {', '.join(known)}"
            )
        check_number(f"{what} weight of {key}", weight, 0, math.inf)
    total = sum(weights.values())
    if weights and not 0 < total < math.inf:
        raise ValueError(
            f"{what.partition(':')[0]}: the weights of {what.rpartition(' ')[2]} sum to {total}; "
            f"give a positive"
        )
    # Weights that already sum to 1 are left alone, so that a policy read from a file is unchanged.
    scale = 1.0 if abs(total - 1) < 1e-9 else total
    return {key: weight / scale for key, weight in weights.items() if weight > 0}


def other_options(site: str, selector: str, scores: Iterable[str], given: object) -> Options:
    """Check the options of a selector and its scores; return those that differ from defaults."""
    known = known_options(selector, scores)
    if not isinstance(given, Mapping):
        raise TypeError(f"{site}: options is {given!r}; give a value for each name")
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{site}: no option {name!r} of {selector} and its scores; "
                f"choose from {', '.join(known) or 'nothing'}"
            )
        _check_option(f"{site}: option {name}", name, value, known[name])
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
    }
    for name, default in known.items():
        if options.get(name, default) in (None, ()):
            raise ValueError(f"{site}: {selector} needs the option {name!r}; give a value")
    return {name: value for name, value in options.items() if value != known[name]}


def _check_option(what: str, name: str, value: object, default: object) -> None:
    """Check that an option is a number, or a list of numbers if its default is a list."""
    several = isinstance(default, tuple)
    if several and not isinstance(value, list | tuple):
        raise ValueError(f"{what} is {value!r}; give a list of numbers")
    low, high = WHOLE_NUMBERS.get(name, (-1e9, 1e9))
    for number in cast(Sequence[object], value) if several else [value]:
        check_number(what, number, low, high)
        if name in WHOLE_NUMBERS and number != int(cast(float, number)):
            raise ValueError(f"{what} is {number!r}; give a whole number")


def check_observe(site: str, observe: object) -> None:
    """Check that a value names a place where attention can be observed."""
    if observe in ("", "next"):
        return
    if not isinstance(observe, str) or split_site(observe)[0] == "projector":
        raise ValueError(f"{site}: observe is {observe!r}; give 'next' or a block's site")


def known_options(selector: str, scores: Iterable[str]) -> dict[str, Any]:
    """Return the options of a selector and its scores, with their defaults."""
    known: dict[str, Any] = dict(SELECTORS[selector].options)
    for score in scores:
        known |= SCORES[score].options
    return known


def check_diversity(site: str, selector: str, diversity: float) -> None:
    """Check that a diversity is a number, and that the selector uses it."""
    check_number(f"{site}: diversity", diversity, 0, 1e3)
    if diversity > 0 and selector != "greedy":
        raise ValueError(
            f"{site}: diversity {diversity} has no effect with the selector {selector!r}; choose "
            "'greedy' or leave it at 0"
        )
