"""One reduction at one site, as plain data: a point in the operator space."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal, cast

from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.scores import SCORES

__all__ = ["Reduction", "Regime", "check_fields", "site_order", "split_site"]

SELECTORS = ("top_k", "greedy", "grid")
WEIGHTINGS = ("one", "score")
POSITIONS = ("keep", "compact")
Regime = Literal["prune", "merge", "pool", "reweight", "mixed"]


@dataclass(frozen=True, repr=False)
class Reduction:
    """One reduction at one site: a point in the operator space.

    Attributes:
        site: ``projector``, ``decoder.<i>`` (after decoder layer i) or ``vision.<i>``.
        keep: Visual tokens kept per image: an int, or a fraction in (0, 1] of the image's original
            visual tokens.
        scores: Weight by name of a score (see ``operator.SCORES``), normalised to sum 1. Left
            empty, it is the attention of the CLS token before the decoder and of the last text
            token inside it (nothing where the scores have no effect).
        selector: ``top_k``, ``greedy`` (with ``diversity`` > 0) or ``grid`` (evenly spread anchors,
            whatever the scores).
        diversity: How much the greedy selector holds similarity to tokens already kept against a
            token.
        gain: g, how much of a dropped token is transferred: 0 prunes, 1 merges.
        temperature: tau of the assignment: 0 is the nearest kept token, infinity all of them alike.
        similarity: Weight by kind, of ``feature``, ``key`` and ``grid``, normalised to sum 1.
        weighting: u of the transfer: ``one``, or ``score`` for the logistic of the score.
        exponent: n of the transfer: 1 is a weighted mean, 0 a sum.
        reweight: rho, kept tokens are scaled by 1 + rho * score.
        residual: The kept token with the lowest score also takes in whatever is not transferred.
        mass_bias: beta, later attention to a token gets the bias beta * log(mass).
        position: ``keep`` the positions of the original prompt, or ``compact`` them.
    """

    site: str
    keep: int | float
    scores: Mapping[str, float] = field(default_factory=dict)
    selector: str = "top_k"
    diversity: float = 0.0
    gain: float = 0.0
    temperature: float = 0.0
    similarity: Mapping[str, float] = field(default_factory=lambda: {"feature": 1.0})
    weighting: str = "one"
    exponent: float = 1.0
    reweight: float = 0.0
    residual: bool = False
    mass_bias: float = 0.0
    position: str = "keep"

    def __post_init__(self) -> None:
        stage, _ = split_site(self.site)
        keep = self.keep
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep > 0:
            raise ValueError(f"{self.site}: keep is {keep!r}; give a count >= 1 or a fraction")
        if isinstance(keep, float) and keep > 1:
            raise ValueError(
                f"{self.site}: keep is {keep!r}; a float is a fraction in (0, 1], for a number of "
                f"tokens give an int"
            )
        default = "last_text_attention" if stage == "decoder" else "cls_attention"
        self._normalise("scores", SCORES, {default: 1.0} if self.uses_scores else {})
        self._normalise("similarity", SIMILARITIES, {"feature": 1.0})
        self._check_choice("selector", SELECTORS)
        self._check_choice("weighting", WEIGHTINGS)
        self._check_choice("position", POSITIONS)
        self._check_numbers()

    def _normalise(self, name: str, known: Mapping[str, object], default: dict[str, float]) -> None:
        weights = getattr(self, name)
        if not isinstance(weights, Mapping):
            raise TypeError(f"{self.site}: {name} is {weights!r}; give a weight for each name")
        for key, weight in weights.items():
            if key not in known:
                raise ValueError(f"{self.site}: no {name} {key!r}; choose from {', '.join(known)}")
            _check_number(f"{self.site}: {name} weight of {key}", weight, 0, math.inf)
        total = sum(weights.values())
        if weights and not 0 < total < math.inf:
            raise ValueError(f"{self.site}: the weights of {name} sum to {total}; give a positive")
        # Left alone when they sum to 1 already, so that a policy read from a file is unchanged.
        scale = 1.0 if abs(total - 1) < 1e-9 else total
        normal = {key: weight / scale for key, weight in weights.items() if weight > 0}
        object.__setattr__(self, name, normal or default)

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{self.site}: {name} is {value!r}; choose from {', '.join(choices)}")

    def _check_numbers(self) -> None:
        limits = {"gain": (0, 1), "diversity": (0, 1e3), "exponent": (0, 4), "mass_bias": (0, 4)}
        for name, (low, high) in (limits | {"reweight": (-1e3, 1e3)}).items():
            _check_number(f"{self.site}: {name}", getattr(self, name), low, high)
        if self.temperature != math.inf:
            _check_number(f"{self.site}: temperature", self.temperature, 0, math.inf)
        if not isinstance(self.residual, bool):
            raise TypeError(f"{self.site}: residual is {self.residual!r}; give True or False")
        if self.diversity > 0 and self.selector != "greedy":
            raise ValueError(
                f"{self.site}: diversity {self.diversity} has no effect with the selector "
                f"{self.selector!r}; choose 'greedy' or leave it at 0"
            )

    @property
    def has_rest(self) -> bool:
        """Whether some content of dropped tokens goes to the residual token."""
        return self.residual and self.gain < 1

    @property
    def uses_score_values(self) -> bool:
        """Whether more than the order of the scores matters, so that they must be standardized."""
        weighted = self.weighting == "score" and (self.gain > 0 or self.residual)
        return self.selector == "greedy" or self.reweight != 0 or weighted

    @property
    def uses_scores(self) -> bool:
        """Whether the scores have any effect; grid anchors alone ignore them."""
        return self.selector != "grid" or self.uses_score_values or self.has_rest

    @property
    def regime(self) -> Regime:
        """The corner of the operator space this reduction sits in, or ``mixed``.

        ``prune`` and ``reweight`` need no gain and a reweighting or soft assignment respectively;
        ``merge`` and ``pool`` are full transfers to the nearest token, pooling over a fixed grid.
        """
        if self.gain == 0 and not self.residual:
            return "reweight" if self.reweight else "prune"
        if self.gain < 1:
            return "mixed"
        if self.temperature > 0 or self.reweight or self.weighting == "score":
            return "reweight"
        if self.exponent != 1:
            return "mixed"
        return "pool" if self.selector == "grid" and set(self.similarity) == {"grid"} else "merge"

    def count(self, visual_tokens: int) -> int:
        """Tokens kept of an image that has ``visual_tokens``: rounded, and at least 1.

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
        """The fields that are not at their defaults, ready for JSON."""
        values = asdict(self)
        given = {
            item.name: values[item.name]
            for item in fields(self)
            if values[item.name] != _default(item)
        }
        return given | ({"temperature": "inf"} if self.temperature == math.inf else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reduction:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: If a field is missing, unknown or out of range.
        """
        values = dict(values)
        check_fields(values, {item.name for item in fields(cls)}, {"site", "keep"}, "a reduction")
        if values.get("temperature") == "inf":
            values["temperature"] = math.inf
        return cls(**values)

    def __repr__(self) -> str:
        given = self.to_dict()
        return f"Reduction({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __str__(self) -> str:
        keep = f"{self.keep:.4g}" if isinstance(self.keep, float) else str(self.keep)
        chosen = "grid" if self.selector == "grid" else f"{self.selector} by {_mix(self.scores)}"
        return f"{self.site}: keep {keep}, {chosen}, {self._treatment()}, positions {self.position}"

    def _treatment(self) -> str:
        words = [f"{self.regime}"]
        if self.gain > 0:
            how = {0: "nearest", math.inf: "uniform"}.get(self.temperature)
            words.append(f"gain {self.gain:.3g}, {how or f'temperature {self.temperature:.3g}'}")
            if self.temperature != math.inf:
                words[-1] += f" by {_mix(self.similarity)}"
        named = {"diversity": 0, "exponent": 1, "reweight": 0, "mass_bias": 0, "weighting": "one"}
        for name, default in named.items():
            value = getattr(self, name)
            if value != default:
                words.append(f"{name} {value if isinstance(value, str) else format(value, '.3g')}")
        if self.residual:
            words.append("residual")
        return words[0] + (f" ({', '.join(words[1:])})" if words[1:] else "")


def split_site(site: str) -> tuple[str, int]:
    """Splits the name of a site into its stage and its layer."""
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
    stage, layer = split_site(site)
    return ("vision", "projector", "decoder").index(stage), layer


def check_fields(values: Mapping[str, Any], known: set[str], needed: set[str], what: str) -> None:
    for missing in sorted(needed - set(values)):
        raise ValueError(f"{what} lacks the field {missing!r}")
    for unknown in sorted(set(values) - known):
        raise ValueError(f"{what} has no field {unknown!r}; the fields are {sorted(known)}")


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
