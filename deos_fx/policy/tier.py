"""One step of a selection, as plain data, with the checks and words that reductions share."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, TypeAlias, cast

from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS, WHOLE_NUMBERS
from deos_fx.policy.shares import told_apart
from deos_fx.policy.site import split_site
from deos_fx.reading import CONTROLS, TEXT_LENGTH

__all__ = [
    "Options",
    "Tier",
    "check_choice",
    "DIVERSITY",
    "HIGHEST_WEIGHT",
    "LEAST_SCALE",
    "MOST_TOKENS",
    "check_diversity",
    "check_count",
    "check_flag",
    "check_keep",
    "check_number",
    "check_observe",
    "check_text",
    "checked_tier",
    "further_counts",
    "given_fields",
    "known_options",
    "normal_weights",
    "other_options",
]

Options: TypeAlias = dict[str, float | tuple[float, ...]]
"""Parameters of a selector and of scores, by name."""
LEAST_SCALE = 1e-3
"""The smallest scale at which images enter: a few pixels of the longest sides would be left."""
DIVERSITY = (0, 1e3)
"""The smallest and the largest diversity."""
MOST_TOKENS = 10**7
"""The largest number of tokens that a reduction may be asked to keep."""
HIGHEST_WEIGHT = 1e9
"""The largest weight of a score or a similarity, before they are normalised."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Tier:
    """One step of a selection: it adds tokens to those that earlier tiers chose.

    Attributes:
        keep: Tokens it chooses: a number, or a fraction of all that the reduction keeps, rounded
            up. The first tier chooses the remaining number.
        selector: Name of a row of ``operator.SELECTORS``.
        scores: As in `Reduction`.
        diversity: As in `Reduction`.
        options: As in `Reduction`.
        observe: As in `Reduction`.
    """

    keep: int | float = 0
    selector: str = "top_k"
    scores: Mapping[str, float] = field(default_factory=dict)
    diversity: float = 0.0
    options: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    observe: str = ""

    @property
    def mixes(self) -> bool:
        """Return whether the values of its score matter in addition to their order."""
        return self.selector == "greedy"

    def count(self, total: int) -> int:
        """Return how many tokens it chooses in a reduction that keeps ``total``."""
        if isinstance(self.keep, int):
            return self.keep
        # 0.07 * 100 is a little more than 7 in floats, and must not be rounded up to 8.
        return math.ceil(self.keep * total - 1e-9)

    def __eq__(self, other: object) -> bool:
        # A share and a number are two amounts, though 1.0 == 1.
        if not isinstance(other, Tier):
            return NotImplemented
        return told_apart(self) == told_apart(other)

    def __hash__(self) -> int:
        # Its other fields may be dicts, which have no hash.
        return hash((isinstance(self.keep, float), self.keep, self.selector))

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in given_fields(self).items())
        return f"Tier({given})"


def further_counts(tiers: Sequence[Tier], total: int, most: int) -> list[int]:
    """Return how many tokens each of the further tiers chooses.

    Args:
        tiers: The tiers after the first.
        total: Tokens that their reduction keeps.
        most: Tokens that the first tier leaves them. Of few tokens, shares rounded up may be more;
            then the last ones give way. Numbers do not.
    """
    counts = [tier.count(total) for tier in tiers]
    for place in reversed(range(len(tiers))):
        if isinstance(tiers[place].keep, float):
            counts[place] -= min(counts[place], max(0, sum(counts) - most))
    return counts


def checked_tier(site: str, tier: object, score: str) -> Tier:
    """Check a further tier of a reduction, and complete its scores and options.

    Args:
        site: The site of the reduction.
        tier: What was given as a tier.
        score: The score to rank by if none is given.

    Raises:
        TypeError: If it is not a tier, or a field has a wrong type.
        ValueError: If a field is unknown or out of range.
    """
    if not isinstance(tier, Tier):
        raise TypeError(f"{site}: tiers has {tier!r}; give Tier(keep=..., selector=...)")
    check_choice(f"{site}: selector", tier.selector, SELECTORS)
    # The order is that of a reduction's own checks: choices, then scores, then the options of both.
    check_keep(f"{site}: a tier", tier.keep, none=True)
    scores = normal_weights(f"{site}: scores", tier.scores, SCORES)
    if not scores and SELECTORS[tier.selector].ranks:
        scores = {score: 1.0}
    check_number(f"{site}: diversity", tier.diversity, *DIVERSITY)
    check_diversity(site, tier.selector, tier.diversity)
    check_observe(site, tier.observe)
    options = other_options(site, tier.selector, scores, tier.options)
    return replace(tier, scores=scores, options=options)


# *** checks of fields ***


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Check that a value is a number within limits."""
    # Python counts True among the integers. `not low <= value` also refuses NaN.
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not low <= cast(float, value) <= high:
        raise ValueError(f"{name} is {value!r}; give a number in [{low:g}, {high:g}]")


def check_count(name: str, value: object, low: int = 0, high: int = 2**31 - 1) -> None:
    """Check that a value is a whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; give a whole number in [{low}, {high}]")


def check_text(what: str, value: object) -> None:
    """Check that a value is a text that a file may have and a terminal can show."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is {value!r}; give a text")
    if len(value) > TEXT_LENGTH:
        raise ValueError(f"{what} has {len(value)} characters; give at most {TEXT_LENGTH}")
    # Halves of surrogate pairs cannot be written to files.
    if found := re.search(f"[{CONTROLS}\ud800-\udfff]", value):
        raise ValueError(f"{what} has the control character {found[0]!r}; leave it out")


def check_choice(what: str, value: object, choices: Collection[str]) -> None:
    """Check that a value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{what} is {value!r}; choose from {', '.join(choices)}")


def check_flag(what: str, value: object) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} is {value!r}; give True or False")


def check_keep(what: str, keep: object, *, none: bool = False) -> None:
    """Check that a value is a number of tokens or a fraction; 0 is one only where `none` is."""
    number = not isinstance(keep, bool) and isinstance(keep, int | float)
    if not number or not (cast(float, keep) > 0 or none and keep == 0):
        raise ValueError(f"{what}: keep is {keep!r}; give a count >= 1 or a fraction")
    # Case: a number of tokens written as a float, or a fraction in percent.
    if isinstance(keep, float) and keep > 1:
        raise ValueError(
            f"{what}: keep is {keep!r}; a float is a fraction in (0, 1], for a number of tokens "
            f"give an int"
        )
    if cast(float, keep) > MOST_TOKENS:
        raise ValueError(f"{what}: keep is {keep!r}; give at most {MOST_TOKENS} tokens")


def normal_weights(what: str, weights: object, known: Mapping[str, object]) -> dict[str, float]:
    """Return weights that sum to 1, without those that are 0.

    Args:
        what: Where the weights are from, for errors: a site, a colon and the name of the field.
        weights: Weight by name.
        known: The names there are.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"{what} is {weights!r}; give a weight for each name")
    for key, weight in weights.items():
        if key not in known:
            name = what.rpartition(" ")[2]
            raise ValueError(
                f"{what.partition(':')[0]}: no {name} {key!r}; choose from {', '.join(known)}"
            )
        check_number(f"{what} weight of {key}", weight, 0, HIGHEST_WEIGHT)
    total = sum(weights.values())
    if weights and not total:
        raise ValueError(
            f"{what.partition(':')[0]}: the weights of {what.rpartition(' ')[2]} sum to {total}; "
            f"give a positive"
        )
    # Weights that already sum to 1 are left alone, so that a policy read from a file is unchanged.
    scale = 1.0 if abs(total - 1) < 1e-9 else total
    normal = {key: weight / scale for key, weight in weights.items()}
    return {key: weight for key, weight in normal.items() if weight > 0}


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
    # JSON has no tuples, and a policy read from a file has to equal the one that was written.
    options = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    # A default of None, or of no numbers, says that a value has to be given.
    for name, default in known.items():
        if options.get(name, default) in (None, ()):
            raise ValueError(f"{site}: {selector} needs the option {name!r}; give a value")
    return {name: value for name, value in options.items() if value != known[name]}


def _check_option(what: str, name: str, value: object, default: object) -> None:
    """Check that an option is a number, or a list of numbers if its default is a list."""
    # The default tells the kind of an option.
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
    # The projector is no block, so it has no attention.
    if not isinstance(observe, str) or split_site(observe)[0] == "projector":
        raise ValueError(f"{site}: observe is {observe!r}; give 'next' or a block's site")


def known_options(selector: str, scores: Iterable[str]) -> dict[str, Any]:
    """Return the options of a selector and its scores, with their defaults."""
    known: dict[str, Any] = dict(SELECTORS[selector].options)
    for score in scores:
        known |= SCORES[score].options
    return known


def check_diversity(site: str, selector: str, diversity: float) -> None:
    """Check that the selector uses a diversity."""
    # Refused rather than ignored: a policy should say what it does.
    if diversity > 0 and selector != "greedy":
        raise ValueError(
            f"{site}: diversity {diversity} has no effect with the selector {selector!r}; choose "
            "'greedy' or leave it at 0"
        )


# *** fields that are shown ***


def given_fields(item: Any) -> dict[str, Any]:
    """Return the fields and options that differ from their defaults, without the tiers.

    They are what files and `repr` show of a reduction or a tier.
    """
    values = {entry.name: getattr(item, entry.name) for entry in fields(item)}
    given = {
        entry.name: values[entry.name]
        for entry in fields(item)
        if entry.name not in ("tiers", "options") and values[entry.name] != _default(entry)
    }
    if item.options:
        given["options"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in item.options.items()
        }
    # A file names the count of a tier even if it is 0; that of a reduction has no default.
    return {"keep": item.keep} | given if isinstance(item, Tier) else given


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
