"""One reduction at one site, as plain data: a point in the operator space."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal, cast

from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS, WHOLE_NUMBERS

__all__ = ["Reduction", "Regime", "Tier", "check_fields", "site_order", "split_site"]

ASSIGNMENTS = ("similar", "k_nearest", "window")
ORDERS = ("position", "tier", "selection")
POSITIONS = ("keep", "compact", "grid")
RECEIVERS = ("all", "last")
WEIGHTINGS = ("one", "score", "raw")
Regime = Literal["prune", "merge", "pool", "reweight", "mixed"]
Option = float | tuple[float, ...]


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
    options: Mapping[str, Option] = field(default_factory=dict)
    observe: str = ""

    @property
    def mixes(self) -> bool:
        """Return whether the values of its score matter in addition to their order."""
        return self.selector == "greedy"

    def count(self, total: int) -> int:
        """Return how many tokens it chooses in a reduction that keeps ``total``."""
        if isinstance(self.keep, int):
            return self.keep
        return math.ceil(self.keep * total - 1e-9)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in _given(self).items())
        return f"Tier({given})"


@dataclass(frozen=True, repr=False)
class Reduction:
    """One reduction at one site: a point in the operator space.

    Attributes:
        site: ``projector``, ``decoder.<i>`` (after decoder layer i) or ``vision.<i>`` (after block
            i of the vision tower).
        keep: Visual tokens that come out, per image: an int, or a fraction in (0, 1] of the image's
            original visual tokens. Where the prompt ends in a visual token, that token is always
            kept, as the last choice.
        scores: Weight by name of a score (see ``operator.SCORES``), normalised to sum 1. If empty,
            it becomes the attention of the CLS token before the decoder and of the last text token
            inside it (or stays empty where scores have no effect).
        selector: Name of a row of ``operator.SELECTORS``: ``top_k``, ``greedy`` (with ``diversity``
            > 0), ``grid`` (evenly spread anchors, whatever the scores) and others.
        diversity: How much similarity to tokens already kept counts against a token, with the
            greedy selector.
        options: Parameters of the selector and of the scores, by name.
        observe: Where attention and keys come from: the block before the site if empty, ``next``
            for the block after it, on the same hidden states, or a site such as ``vision.5``.
        tiers: Further tiers, each choosing among the tokens that earlier tiers left.
        order: Order of the output: ``position`` in the image, ``tier`` (tier by tier, each in the
            order of the image) or ``selection`` (in the order of the choices).
        receivers: Which kept tokens take in others: ``all``, or those of the ``last`` tier.
        gain: g, how much of a dropped token is transferred: 0 prunes, 1 merges.
        assignment: ``similar``: every dropped token goes to similar kept ones; ``k_nearest``: every
            kept one takes its ``neighbours`` nearest others; ``window``: bilinear interpolation of
            the grid.
        temperature: tau of the assignment: 0 assigns to the nearest kept token, infinity to all
            kept tokens equally.
        similarity: Weight by kind, of ``feature``, ``key``, ``joint_key`` and ``grid``, normalised
            to sum 1.
        neighbours: Tokens that each kept one takes with ``k_nearest``.
        weighting: u of the transfer: ``one``, ``score`` for the logistic of the standardized score,
            ``raw`` for the score as it is, without the masses.
        exponent: n of the transfer: 1 is a weighted mean, 0 a sum.
        average: Whether the tokens that a kept one receives are averaged before they are added.
        reweight: rho; kept tokens are scaled by 1 + rho * score.
        residual: Whether one of the tokens that come out takes in all content that is not
            transferred otherwise. It is the last choice or, with further tiers, the best token by
            score that no tier chose, and it comes last unless the order is that of the image.
        keep_class: Whether the first token that comes out is a copy of the CLS token.
        mass_bias: beta; later attention of the same stage (tower or decoder) to a token gets the
            bias beta * log(mass).
        position: ``keep`` the positions of the original prompt, ``compact`` them, or ``grid``:
            tokens keep their place in their image, and tokens after an image follow the last token
            that is kept of it. Before the decoder one rule holds for all reductions: ``compact`` if
            one of them asks for it, else ``grid``, else ``keep``.
    """

    site: str
    keep: int | float
    scores: Mapping[str, float] = field(default_factory=dict)
    selector: str = "top_k"
    diversity: float = 0.0
    options: Mapping[str, Option] = field(default_factory=dict)
    observe: str = ""
    tiers: tuple[Tier, ...] = ()
    order: str = "position"
    receivers: str = "all"
    gain: float = 0.0
    assignment: str = "similar"
    temperature: float = 0.0
    similarity: Mapping[str, float] = field(default_factory=lambda: {"feature": 1.0})
    neighbours: int = 0
    weighting: str = "one"
    exponent: float = 1.0
    average: bool = False
    reweight: float = 0.0
    residual: bool = False
    keep_class: bool = False
    mass_bias: float = 0.0
    position: str = "keep"

    def __post_init__(self) -> None:
        stage, _ = split_site(self.site)
        _check_keep(self.site, self.keep)
        if not self.keep:
            raise ValueError(f"{self.site}: keep is {self.keep!r}; give a count >= 1 or a fraction")
        self._check_choice("selector", tuple(SELECTORS))
        self._check_choice("assignment", ASSIGNMENTS)
        self._check_choice("order", ORDERS)
        self._check_choice("receivers", RECEIVERS)
        self._check_choice("weighting", WEIGHTINGS)
        self._check_choice("position", POSITIONS)
        default = "last_text_attention" if stage == "decoder" else "cls_attention"
        scores = _normal(f"{self.site}: scores", self.scores, SCORES)
        used = {default: 1.0} if self.uses_scores else {}
        # The dataclass is frozen, so the completed values are set in this way.
        object.__setattr__(self, "scores", scores or used)
        similarity = _normal(f"{self.site}: similarity", self.similarity, SIMILARITIES)
        object.__setattr__(self, "similarity", similarity or {"feature": 1.0})
        object.__setattr__(self, "options", _options(self.site, self))
        object.__setattr__(
            self, "tiers", tuple(self._checked(tier, default) for tier in self.tiers)
        )
        self._check_numbers()
        self._check_together()

    def _checked(self, tier: Tier, default: str) -> Tier:
        """Check a further tier, and complete its scores and options."""
        if not isinstance(tier, Tier):
            raise TypeError(f"{self.site}: tiers has {tier!r}; give Tier(keep=..., selector=...)")
        if tier.selector not in SELECTORS:
            raise ValueError(
                f"{self.site}: selector is {tier.selector!r}; choose from {', '.join(SELECTORS)}"
            )
        _check_keep(f"{self.site}: a tier", tier.keep)
        scores = _normal(f"{self.site}: scores", tier.scores, SCORES)
        if not scores and SELECTORS[tier.selector].ranks:
            scores = {default: 1.0}
        tier = replace(tier, scores=scores)
        _check_diversity(self.site, tier)
        _check_observe(self.site, tier.observe)
        return replace(tier, options=_options(self.site, tier))

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{self.site}: {name} is {value!r}; choose from {', '.join(choices)}")

    def _check_numbers(self) -> None:
        limits = {"gain": (0, 1), "exponent": (0, 4), "mass_bias": (0, 4)}
        for name, (low, high) in (limits | {"reweight": (-1e3, 1e3)}).items():
            _check_number(f"{self.site}: {name}", getattr(self, name), low, high)
        if self.temperature != math.inf:
            _check_number(f"{self.site}: temperature", self.temperature, 0, math.inf)
        for name in ("residual", "keep_class", "average"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{self.site}: {name} is {getattr(self, name)!r}; give True or False"
                )
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int):
            raise TypeError(
                f"{self.site}: neighbours is {self.neighbours!r}; give a number of tokens"
            )
        _check_diversity(self.site, self)
        _check_observe(self.site, self.observe)

    def _check_together(self) -> None:
        """Check settings that depend on each other."""
        site, stage = self.site, split_site(self.site)[0]
        if self.order != "position" and (stage == "decoder" or self.position != "compact"):
            raise ValueError(
                f"{site}: order {self.order!r} needs a site before the decoder and the position "
                f"'compact', because tokens out of the image's order have no positions to keep"
            )
        if self.keep_class and (stage != "vision" or self.order == "position"):
            raise ValueError(
                f"{site}: keep_class works in the vision tower with the order 'tier' or 'selection'"
            )
        if (self.assignment == "k_nearest") != (self.neighbours > 0) or self.neighbours < 0:
            raise ValueError(
                f"{site}: assignment {self.assignment!r} with {self.neighbours} neighbours; give "
                f"'k_nearest' and a number of neighbours together"
            )
        if self.assignment == "window" and self.selector != "grid":
            raise ValueError(f"{site}: the assignment 'window' needs the selector 'grid'")
        if self.weighting == "raw" and len(self.scores) != 1:
            raise ValueError(f"{site}: weighting 'raw' needs exactly one score, not {self.scores}")
        if self.selector == "bipartite" and self.order == "tier":
            raise ValueError(
                f"{site}: the halves of 'bipartite' are one tier, and the order 'tier' would mix "
                f"them; choose 'selection' or 'position'"
            )
        first = SELECTORS[self.selector]
        if self.residual and (not first.ranks or first.flags):
            raise ValueError(f"{site}: residual needs a selector that ranks, not {self.selector!r}")
        if self.residual and self.average:
            raise ValueError(f"{site}: average and residual exclude each other; choose one")
        self._check_tiers()

    def _check_tiers(self) -> None:
        """Check what each tier chooses, and from which tokens."""
        last = self.selection[-1].selector
        if SELECTORS[last].flags:
            raise ValueError(
                f"{self.site}: {last!r} only says what a later tier prefers; add Tier(keep=1.0)"
            )
        for tier in self.tiers:
            selector = SELECTORS[tier.selector]
            if not selector.flags and "taken" not in selector.needs:
                raise ValueError(
                    f"{self.site}: {tier.selector!r} chooses among all tokens of a site, so it "
                    f"works in the first tier only"
                )
            if (tier.keep == 0) != selector.flags:
                raise ValueError(
                    f"{self.site}: a tier of {tier.selector!r} keeps {tier.keep!r}; give "
                    + ("0, it chooses none itself" if selector.flags else "it some tokens")
                )

    @property
    def selection(self) -> tuple[Tier, ...]:
        """Return all tiers with all options; the first is made of the reduction's own fields."""
        first = Tier(
            selector=self.selector,
            scores=self.scores,
            diversity=self.diversity,
            options=self.options,
            observe=self.observe,
        )
        return tuple(
            replace(tier, options=_known_options(tier) | dict(tier.options))
            for tier in (first, *self.tiers)
        )

    def tier_counts(self, total: int) -> list[int]:
        """Return how many of ``total`` tokens each tier chooses.

        With further tiers, no tier chooses the residual token, so the first tier chooses one token
        less.

        Raises:
            ValueError: If the further tiers leave nothing for the first tier, or leave something
                where the first tier only flags tokens.
        """
        others = [tier.count(total) for tier in self.tiers]
        first = total - sum(others) - (1 if self.tiers and self.has_rest else 0)
        flags = SELECTORS[self.selector].flags
        if first != 0 if flags else first < 1:
            raise ValueError(
                f"{self.site} keeps {total} tokens, of which the tiers after the first take "
                f"{sum(others)}; "
                + (
                    "let them take all"
                    if flags and first > 0
                    else "keep more, or give the tiers less"
                )
            )
        return [first, *others]

    @property
    def transfers(self) -> bool:
        """Return whether content of dropped tokens goes to kept ones."""
        return self.gain > 0 or self.has_rest

    @property
    def whole_grid(self) -> bool:
        """Return whether it needs complete images, with no token dropped by score before."""
        return any(SELECTORS[tier.selector].whole_grid for tier in self.selection)

    @property
    def leaves_grid(self) -> bool:
        """Return whether the kept tokens are complete, coarser images again."""
        return self.selector == "grid" and not self.tiers

    @property
    def has_rest(self) -> bool:
        """Return whether some content of dropped tokens goes to the residual token."""
        return self.residual and (self.gain < 1 or self.assignment == "k_nearest")

    @property
    def uses_score_values(self) -> bool:
        """Return whether the scores' values matter, not just their order: they are standardized."""
        weighted = self.weighting == "score" and (self.gain > 0 or self.residual)
        return self.selector == "greedy" or self.reweight != 0 or weighted

    @property
    def uses_scores(self) -> bool:
        """Return whether the scores have any effect; a pure choice of grid anchors ignores them."""
        raw = self.weighting == "raw" and self.transfers
        return SELECTORS[self.selector].ranks or self.uses_score_values or self.has_rest or raw

    @property
    def regime(self) -> Regime:
        """Return the regime of the operator space that this reduction belongs to, or ``mixed``.

        1. Nothing is transferred (g = 0, no residual token): ``reweight`` if kept tokens are
           rescaled, else ``prune``.
        2. Everything is transferred (g = 1): ``reweight`` with a soft assignment, rescaling or
           weights by score; else, as a mean (n = 1), ``pool`` over a fixed grid or ``merge``.
        3. All other transfers are ``mixed``.
        """
        # Case 1: nothing is transferred.
        if self.gain == 0 and not self.residual:
            return "reweight" if self.reweight else "prune"
        # Case 3: kept tokens take in a part, or only the residual token takes in anything.
        if self.gain < 1:
            return "mixed"
        # Case 2: everything is transferred.
        if self.temperature > 0 or self.reweight or self.weighting == "score":
            return "reweight"
        if self.exponent != 1:
            return "mixed"
        over_grid = set(self.similarity) == {"grid"} or self.assignment == "window"
        return "pool" if self.selector == "grid" and over_grid else "merge"

    def count(self, visual_tokens: int) -> int:
        """Return how many tokens stay of an image with ``visual_tokens``: rounded, at least 1.

        Raises:
            ValueError: If ``keep`` is a number of tokens that the image does not have.
        """
        if isinstance(self.keep, float):
            return max(1, round(self.keep * visual_tokens))
        if self.keep > visual_tokens:
            raise ValueError(
                f"{self.site} keeps {self.keep} visual tokens, but an image of this model has only "
                f"{visual_tokens}; keep at most {visual_tokens}, or give a fraction"
            )
        return self.keep

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, ready for JSON."""
        given = _given(self)
        if self.tiers:
            given["tiers"] = [_given(tier) for tier in self.tiers]
        # JSON has no infinity.
        return given | ({"temperature": "inf"} if self.temperature == math.inf else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reduction:
        """Read a reduction from the fields that ``to_dict`` returned.

        Raises:
            ValueError: If a field is missing, unknown or out of range.
        """
        values = dict(values)
        check_fields(values, {item.name for item in fields(cls)}, {"site", "keep"}, "a reduction")
        if values.get("temperature") == "inf":
            values["temperature"] = math.inf
        tiers = []
        given = values.pop("tiers", ())
        if not isinstance(given, list | tuple) or not all(isinstance(x, Mapping) for x in given):
            raise ValueError(f"tiers is {given!r}; give a list of objects with named fields")
        for tier in given:
            check_fields(tier, {item.name for item in fields(Tier)}, {"keep"}, "a tier")
            tiers.append(Tier(**tier))
        return cls(**values, tiers=tuple(tiers))

    def __repr__(self) -> str:
        given = _given(self) | ({"tiers": self.tiers} if self.tiers else {})
        return f"Reduction({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __str__(self) -> str:
        keep = f"{self.keep:.4g}" if isinstance(self.keep, float) else str(self.keep)
        chosen = " then ".join(_described(tier) for tier in self.selection)
        order = "" if self.order == "position" else f" in the order of the {self.order}"
        treatment = self._treatment()
        return f"{self.site}: keep {keep}, {chosen}{order}, {treatment}, positions {self.position}"

    def _treatment(self) -> str:
        words = [f"{self.regime}"]
        if self.gain > 0:
            words.append(f"gain {self.gain:.3g}, {self._assigned()}")
            if self.assignment != "window" and self.temperature != math.inf:
                words[-1] += f" by {_mix(self.similarity)}"
        named = {"diversity": 0, "exponent": 1, "reweight": 0, "mass_bias": 0, "weighting": "one"}
        for name, default in named.items():
            value = getattr(self, name)
            if value != default:
                words.append(f"{name} {value if isinstance(value, str) else format(value, '.3g')}")
        flags = ("average", "residual", "keep_class")
        words += [name.replace("_", " ") for name in flags if getattr(self, name)]
        if self.receivers == "last":
            words.append("into the last tier")
        return words[0] + (f" ({', '.join(words[1:])})" if words[1:] else "")

    def _assigned(self) -> str:
        if self.assignment == "k_nearest":
            return f"{self.neighbours} nearest"
        if self.assignment == "window":
            return "bilinear"
        how = {0: "nearest", math.inf: "uniform"}.get(self.temperature)
        return how or f"temperature {self.temperature:.3g}"


def split_site(site: str) -> tuple[str, int]:
    """Split the name of a site into its stage and its layer (0 for ``projector``)."""
    if site == "projector":
        return site, 0
    match = re.fullmatch(r"(vision|decoder)\.(\d+)", site) if isinstance(site, str) else None
    if match is None:
        raise ValueError(
            f"no site {site!r}; a site is 'projector', 'decoder.<i>' (after decoder layer i) or "
            f"'vision.<i>'"
        )
    return match[1], int(match[2])


def site_order(site: str) -> tuple[int, int]:
    """Return a key that sorts sites from the input of a model to its output."""
    stage, layer = split_site(site)
    return ("vision", "projector", "decoder").index(stage), layer


def check_fields(values: Mapping[str, Any], known: set[str], needed: set[str], what: str) -> None:
    """Check the names of fields that were read from a file.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    for missing in sorted(needed - set(values)):
        raise ValueError(f"{what} lacks the field {missing!r}")
    for unknown in sorted(set(values) - known):
        raise ValueError(f"{what} has no field {unknown!r}; the fields are {sorted(known)}")


def _check_keep(what: str, keep: object) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep >= 0:
        raise ValueError(f"{what}: keep is {keep!r}; give a count >= 1 or a fraction")
    if isinstance(keep, float) and keep > 1:
        raise ValueError(
            f"{what}: keep is {keep!r}; a float is a fraction in (0, 1], for a number of tokens "
            f"give an int"
        )


def _normal(what: str, weights: object, known: Mapping[str, object]) -> dict[str, float]:
    """Return weights that sum to 1, without those that are 0."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{what} is {weights!r}; give a weight for each name")
    for key, weight in weights.items():
        if key not in known:
            name = what.rpartition(" ")[2]
            raise ValueError(
                f"{what.partition(':')[0]}: no {name} {key!r}; choose from {', '.join(known)}"
            )
        _check_number(f"{what} weight of {key}", weight, 0, math.inf)
    total = sum(weights.values())
    if weights and not 0 < total < math.inf:
        raise ValueError(
            f"{what.partition(':')[0]}: the weights of {what.rpartition(' ')[2]} sum to {total}; "
            f"give a positive"
        )
    # Weights that already sum to 1 are left alone, so that a policy read from a file is unchanged.
    scale = 1.0 if abs(total - 1) < 1e-9 else total
    return {key: weight / scale for key, weight in weights.items() if weight > 0}


def _options(site: str, tier: Reduction | Tier) -> dict[str, Option]:
    """Check the options of a selector and its scores; return those that differ from defaults."""
    known = _known_options(tier)
    if not isinstance(tier.options, Mapping):
        raise TypeError(f"{site}: options is {tier.options!r}; give a value for each name")
    for name, value in tier.options.items():
        if name not in known:
            raise ValueError(
                f"{site}: no option {name!r} of {tier.selector} and its scores; "
                f"choose from {', '.join(known) or 'nothing'}"
            )
        _check_option(f"{site}: option {name}", name, value, known[name])
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in tier.options.items()
    }
    for name, default in known.items():
        if options.get(name, default) in (None, ()):
            raise ValueError(f"{site}: {tier.selector} needs the option {name!r}; give a value")
    return {name: value for name, value in options.items() if value != known[name]}


def _check_option(what: str, name: str, value: object, default: object) -> None:
    """Check that an option is a number, or a list of numbers if its default is a list."""
    several = isinstance(default, tuple)
    if several and not isinstance(value, list | tuple):
        raise ValueError(f"{what} is {value!r}; give a list of numbers")
    low, high = WHOLE_NUMBERS.get(name, (-1e9, 1e9))
    for number in cast(Sequence[object], value) if several else [value]:
        _check_number(what, number, low, high)
        if name in WHOLE_NUMBERS and number != int(cast(float, number)):
            raise ValueError(f"{what} is {number!r}; give a whole number")


def _check_observe(site: str, observe: object) -> None:
    if observe in ("", "next"):
        return
    if not isinstance(observe, str) or split_site(observe)[0] == "projector":
        raise ValueError(f"{site}: observe is {observe!r}; give 'next' or a block's site")


def _known_options(tier: Reduction | Tier) -> dict[str, Any]:
    known: dict[str, Any] = dict(SELECTORS[tier.selector].options)
    for score in tier.scores:
        known |= SCORES[score].options
    return known


def _check_diversity(site: str, tier: Reduction | Tier) -> None:
    _check_number(f"{site}: diversity", tier.diversity, 0, 1e3)
    if tier.diversity > 0 and tier.selector != "greedy":
        raise ValueError(
            f"{site}: diversity {tier.diversity} has no effect with the selector "
            f"{tier.selector!r}; choose 'greedy' or leave it at 0"
        )


def _given(item: Reduction | Tier) -> dict[str, Any]:
    """Return the fields and options that differ from their defaults, without the tiers."""
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
    return {"keep": item.keep} | given if isinstance(item, Tier) else given


def _described(tier: Tier) -> str:
    """Describe a tier in words: its selector, its scores, and where they are observed."""
    selector = SELECTORS[tier.selector]
    words = tier.selector
    if selector.ranks:
        words += f" by {_mix(tier.scores)}"
    if tier.observe:
        words += f" of {'the next block' if tier.observe == 'next' else tier.observe}"
    return words


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not low <= cast(float, value) <= high or value == math.inf:
        raise ValueError(f"{name} is {value!r}; give a number in [{low:g}, {high:g}]")


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _mix(weights: Mapping[str, float]) -> str:
    if len(weights) == 1:
        return next(iter(weights))
    return " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())
