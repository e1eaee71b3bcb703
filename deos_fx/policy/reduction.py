"""One reduction at one site, as plain data: a point in the operator space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.checks import check_together
from deos_fx.policy.learned import Learned
from deos_fx.policy.shares import read_keep, told_apart, write_keep
from deos_fx.policy.site import split_site
from deos_fx.policy.tier import (
    DIVERSITY,
    Tier,
    check_choice,
    check_diversity,
    check_flag,
    check_keep,
    check_number,
    check_observe,
    checked_tier,
    further_counts,
    given_fields,
    known_options,
    normal_weights,
    other_options,
)
from deos_fx.policy.words import in_words
from deos_fx.words import counted

__all__ = ["HIGHEST_TEMPERATURE", "RANGES", "Reduction", "Regime"]

RANGES: Mapping[str, tuple[float, float]] = {
    "gain": (0, 1),
    "exponent": (0, 4),
    "mass_bias": (0, 4),
    "sharpness": (0, 1e3),
    "reweight": (-1e3, 1e3),
    "diversity": DIVERSITY,
}
"""Name of a number -> its smallest and its largest value."""
HIGHEST_TEMPERATURE = 1e9
"""The largest temperature besides infinity."""
ASSIGNMENTS = ("similar", "k_nearest", "window")
ORDERS = ("position", "tier", "selection")
POSITIONS = ("keep", "compact", "grid")
RECEIVERS = ("all", "last")
WEIGHTINGS = ("one", "score", "raw")
Regime = Literal["prune", "merge", "pool", "reweight", "mixed"]


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
        similarity: Weight by kind, of ``feature``, ``centred``, ``key``, ``joint_key``, ``grid``
            and ``learned``, normalised to sum 1.
        neighbours: Tokens that each kept one takes with ``k_nearest``.
        weighting: u of the transfer: ``one``, ``score`` for the logistic of the standardized score,
            ``raw`` for the score as it is, without the masses.
        sharpness: kappa; with the weighting ``score``, the steepness of the logistic.
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
    options: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
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
    sharpness: float = 1.0
    exponent: float = 1.0
    average: bool = False
    reweight: float = 0.0
    residual: bool = False
    keep_class: bool = False
    mass_bias: float = 0.0
    position: str = "keep"
    learned: Learned = field(default_factory=lambda: Learned({}))

    def __post_init__(self) -> None:
        # 1. What every other check refers to, and numbers.
        stage, _ = split_site(self.site)
        check_keep(self.site, self.keep)
        check_choice(f"{self.site}: selector", self.selector, SELECTORS)
        check_choice(f"{self.site}: assignment", self.assignment, ASSIGNMENTS)
        check_choice(f"{self.site}: order", self.order, ORDERS)
        check_choice(f"{self.site}: receivers", self.receivers, RECEIVERS)
        check_choice(f"{self.site}: weighting", self.weighting, WEIGHTINGS)
        check_choice(f"{self.site}: position", self.position, POSITIONS)
        self._check_numbers()
        # 2. Fields that are completed. Scores come before options, since scores have options too.
        default = "last_text_attention" if stage == "decoder" else "cls_attention"
        learned = Learned(self.learned, f"{self.site}: learned")
        object.__setattr__(self, "learned", learned)
        scores = normal_weights(f"{self.site}: scores", self.scores, SCORES)
        # Scores without effect stay empty, so that equal methods are equal policies.
        used = {default: 1.0} if self.uses_scores and not learned.scores else {}
        # The dataclass is frozen, so the completed values are set in this way.
        object.__setattr__(self, "scores", scores or used)
        similarity = normal_weights(f"{self.site}: similarity", self.similarity, SIMILARITIES)
        object.__setattr__(self, "similarity", similarity or {"feature": 1.0})
        options = other_options(self.site, self.selector, self.scores, self.options)
        object.__setattr__(self, "options", options)
        if not isinstance(self.tiers, Iterable):
            raise TypeError(f"{self.site}: tiers is {self.tiers!r}; give a tuple of tiers")
        tiers = tuple(checked_tier(self.site, tier, default) for tier in self.tiers)
        object.__setattr__(self, "tiers", tiers)
        # 3. Settings that exclude each other.
        check_together(self)

    def _check_numbers(self) -> None:
        for name, (low, high) in RANGES.items():
            check_number(f"{self.site}: {name}", getattr(self, name), low, high)
        # Infinity is a temperature as well.
        if not (isinstance(self.temperature, float) and self.temperature == math.inf):
            check_number(f"{self.site}: temperature", self.temperature, 0, HIGHEST_TEMPERATURE)
        for name in ("residual", "keep_class", "average"):
            check_flag(f"{self.site}: {name}", getattr(self, name))
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int):
            raise TypeError(
                f"{self.site}: neighbours is {self.neighbours!r}; give a number of tokens"
            )
        check_diversity(self.site, self.selector, self.diversity)
        check_observe(self.site, self.observe)

    @property
    def selection(self) -> tuple[Tier, ...]:
        """Return all tiers with all options; the first is made of the reduction's own fields."""
        # The count of the first tier is what the others leave, so it has none.
        first = Tier(
            selector=self.selector,
            scores=self.scores,
            diversity=self.diversity,
            options=self.options,
            observe=self.observe,
        )
        return tuple(
            replace(tier, options=known_options(tier.selector, tier.scores) | dict(tier.options))
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
        # The further tiers take their shares; the first one gets the remaining tokens.
        flags = SELECTORS[self.selector].flags
        others = further_counts(self.tiers, total, total - (0 if flags else 1 + self.has_rest))
        first = total - sum(others) - (1 if any(others) and self.has_rest else 0)
        if first != 0 if flags else first < 1:
            raise ValueError(
                f"{self.site} keeps {counted(total, 'token')}, of which the tiers after the first "
                f"take {sum(others)}; "
                + (
                    "let them take all"
                    if flags and first > 0
                    else "keep more, or give the tiers less"
                )
            )
        return [first, *others]

    def among(self, total: int) -> Reduction:
        """Return the reduction for images of which ``total`` tokens stay: tiers that get none go.

        Raises:
            ValueError: As `tier_counts`.
        """
        _, *others = self.tier_counts(total)
        if all(others):
            return self
        tiers = tuple(tier for tier, count in zip(self.tiers, others, strict=True) if count)
        return replace(self, tiers=tiers, receivers=self.receivers if tiers else "all")

    @property
    def transfers(self) -> bool:
        """Return whether content of dropped tokens goes to kept ones."""
        return self.gain > 0 or self.has_rest

    @property
    def whole_grid(self) -> bool:
        """Return whether it needs complete images, from which no score has dropped a token."""
        return any(SELECTORS[tier.selector].whole_grid for tier in self.selection)

    @property
    def leaves_grid(self) -> bool:
        """Return whether the kept tokens are complete, coarser images again."""
        return self.selector == "grid" and not self.tiers

    @property
    def has_rest(self) -> bool:
        """Return whether some content of dropped tokens goes to the residual token."""
        # With the full gain, an assignment of every dropped token leaves nothing over.
        return self.residual and (self.gain < 1 or self.assignment == "k_nearest")

    @property
    def uses_score_values(self) -> bool:
        """Return whether the values of the scores matter, not just their order.

        Such scores are standardized.
        """
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
        # Case: a fraction of the image's own number of tokens.
        if isinstance(self.keep, float):
            return max(1, round(self.keep * visual_tokens))
        if self.keep > visual_tokens:
            raise ValueError(
                f"{self.site} keeps {self.keep} visual tokens, but an image of this model has only "
                f"{visual_tokens}; keep at most {visual_tokens}, or give a fraction"
            )
        return self.keep

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, ready for JSON.

        Of learned parts, only shapes and dtypes are among them.
        """
        given = write_keep(given_fields(self))
        if self.tiers:
            given["tiers"] = [write_keep(given_fields(tier)) for tier in self.tiers]
        # JSON has no infinity, so `from_dict` reads it as a word.
        given |= {"temperature": "inf"} if self.temperature == math.inf else {}
        # Tensors are in a file of their own: the policy's.
        return given | ({"learned": self.learned.summary()} if self.learned else {})

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> Reduction:
        """Make a reduction of the fields that ``to_dict`` returned, once a schema has checked them.

        Args:
            values: The fields.
            tensors: Its learned parts by name.

        Raises:
            ValueError: If fields contradict each other, or learned parts are not those that the
                fields name.
        """
        values = read_keep(values)
        learned = Learned(tensors or {})
        if values.pop("learned", {}) != learned.summary():
            raise ValueError(
                f"the learned parts of {values.get('site')} are {learned.summary()}, which are not "
                f"those of the policy; read a policy with Policy.load, beside its .safetensors file"
            )
        if values.get("temperature") == "inf":
            values["temperature"] = math.inf
        tiers = (Tier(**read_keep(tier)) for tier in values.pop("tiers", ()))
        return cls(**values, tiers=tuple(tiers), learned=learned)

    def __eq__(self, other: object) -> bool:
        # A share and a number are two amounts, though 1.0 == 1.
        if not isinstance(other, Reduction):
            return NotImplemented
        return told_apart(self) == told_apart(other)

    def __hash__(self) -> int:
        # Its other fields may be dicts, which have no hash.
        return hash((self.site, isinstance(self.keep, float), self.keep, self.tiers))

    def __repr__(self) -> str:
        given = given_fields(self) | ({"tiers": self.tiers} if self.tiers else {})
        return f"Reduction({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __str__(self) -> str:
        return in_words(self)
