"""The relaxed form of a reduction: it is differentiable, and no token really leaves.

A dropped token keeps its place with a gate near 0. Later attention gets the logarithm of the gate
as a bias; hidden states are never multiplied by gates, because a norm would undo that. With
saturated parameters, the result on the kept tokens is that of the static form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deos_fx.forms.needs import feature_name
from deos_fx.forms.soft_top_k import SATURATED, soft_top_k
from deos_fx.operator import assign, grid, sequential, transfer
from deos_fx.operator.scores import LOG_FLOOR, SCORES, combine, standardize
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.reduction import Reduction

__all__ = ["RelaxedOutput", "RelaxedReduction", "has_relaxed_form"]

HARD = 1e-3
"""Below this temperature, tokens are assigned to the nearest token only."""
SOFT = 1e3
"""From this temperature on, tokens are assigned to all tokens equally."""
AHEAD = 10.0
"""A lead, in deviations of the score, that is certain to open a gate first."""
NEGLIGIBLE = 0.005
"""Parameters closer than this to a value that removes their operator are set to that value."""


class RelaxedOutput(NamedTuple):
    """Result of a relaxed reduction.

    Attributes:
        tokens: [B, V, d], every token in its place.
        alive: Gates [B, V], at most the incoming ones; later attention gets the bias log(alive).
        mass: [B, V]; masses of tokens with a closed gate have no meaning.
        score: Standardized [B, V]; zeros if no scores are used.
    """

    tokens: Tensor
    alive: Tensor
    mass: Tensor
    score: Tensor


class RelaxedReduction(nn.Module):
    """A reduction whose parameters are learned.

    The starting point says which scores and similarities are mixed, and fixes the settings that are
    not learned: selector, weighting, exponent, residual and position. The learned parameters, each
    an unbounded number, are:

    1. ``activation`` a and ``retention`` r (through a sigmoid): the gates of a row sum to
       (1 - a (1 - r)) times the incoming ones, so an inactive site (a = 0) is the identity;
    2. ``scores`` and ``similarity`` weights (softmax);
    3. ``diversity`` and ``mass_bias`` (softplus), ``gain`` (sigmoid), ``log_temperature`` and
       ``reweight`` (as they are).

    A dropped token moves the part of it that its gate loses, alive - alive'. This part is assigned
    to the other tokens by softmax_i(a_ij / tau + (1 + 1 / tau) log alive'_i). With gates that are
    open or closed this is the static assignment at every temperature; a half open token is less of
    a target at low temperatures and receives half at high ones.

    Attributes:
        gate_temperature: Width of the gates' transition, in standard deviations of the score; the
            search lowers it.
    """

    def __init__(
        self,
        start: Reduction,
        *,
        activation: float,
        retention: float,
        gate_temperature: float = 0.5,
    ) -> None:
        super().__init__()
        if not has_relaxed_form(start):
            raise ValueError(
                f"{start} has no relaxed form, so it cannot be searched; start from one with a "
                f"single tier of {', '.join(_RELAXED)}, in the order of the image"
            )
        self.start = start
        self.gate_temperature = gate_temperature
        self.activation = _parameter(_logit(activation))
        self.retention = _parameter(_logit(retention))
        self.scores = _parameter([math.log(weight) for weight in start.scores.values()])
        self.similarity = _parameter([math.log(weight) for weight in start.similarity.values()])
        self.diversity = _parameter(_softplus_inverse(start.diversity))
        self.gain = _parameter(_logit(start.gain))
        # A temperature of 0 or infinity becomes one that is surely hard or soft.
        temperature = min(max(start.temperature, HARD / 10), SOFT * 10)
        self.log_temperature = _parameter(math.log(temperature))
        self.reweight = _parameter(start.reweight)
        self.mass_bias = _parameter(_softplus_inverse(start.mass_bias))

    @classmethod
    def from_reduction(cls, reduction: Reduction, fraction: float) -> RelaxedReduction:
        """Return a saturated relaxed reduction that equals the static one.

        Args:
            reduction: The static reduction.
            fraction: The fraction of incoming tokens that it keeps.
        """
        return cls(reduction, activation=1.0, retention=fraction, gate_temperature=1e-6)

    def to_reduction(self, site: str, keep: int | float) -> Reduction:
        """Return the static reduction at the present parameters, without negligible parts."""
        scores = dict(zip(self.start.scores, self.scores.softmax(0).tolist(), strict=True))
        kinds = dict(zip(self.start.similarity, self.similarity.softmax(0).tolist(), strict=True))
        temperature = self.log_temperature.exp().item()
        scores, kinds = _main(scores), _main(kinds)
        diversity = _rounded(F.softplus(self.diversity).item())
        greedy = self.start.selector == "greedy" and diversity > 0
        # Greedy without diversity is top_k, which is cheaper.
        plain = self.start.selector == "greedy" and not greedy
        selector = "top_k" if plain else self.start.selector
        # Options of a selector or score that has dropped out go with it.
        known = {*SELECTORS[selector].options}.union(*(SCORES[name].options for name in scores))
        gain = _rounded(self.gain.sigmoid().item())
        return replace(
            self.start,
            site=site,
            keep=keep,
            scores=scores,
            similarity=kinds,
            selector=selector,
            options={name: value for name, value in self.start.options.items() if name in known},
            diversity=diversity if greedy else 0.0,
            gain=gain,
            temperature=_snapped(temperature) if gain else 0.0,
            reweight=_rounded(self.reweight.item()) if scores else 0.0,
            mass_bias=_rounded(F.softplus(self.mass_bias).item()),
        )

    def keep_fraction(self, before: Tensor | float = 1.0) -> Tensor:
        """Return the fraction of original tokens alive after the site, given that before it."""
        return before * (1 - self.activation.sigmoid() * (1 - self.retention.sigmoid()))

    def bias_after(self, before: Tensor | float = 0.0) -> Tensor:
        """Return beta for the log-mass bias of later attention, given that of the sites before.

        The last active site decides: beta' = (1 - a) beta + a beta_site.
        """
        activation = self.activation.sigmoid()
        return (1 - activation) * before + activation * F.softplus(self.mass_bias)

    def forward(
        self,
        tokens: Tensor,
        alive: Tensor,
        mass: Tensor,
        features: Mapping[str, Tensor],
        last_of: int = 0,
    ) -> RelaxedOutput:
        """Apply the reduction.

        Args:
            tokens: Hidden states [B, V, d].
            alive: Gates so far [B, V].
            mass: [B, V].
            features: As for ``static_reduce``.
            last_of: As for ``static_reduce``.
        """
        options = {
            feature_name(name, self.start.observe): torch.tensor(value)
            for name, value in self.start.selection[0].options.items()
        }
        features = {**options, **features, "tokens": tokens}
        # 1. The ranking, and gates that sum to the expected count.
        score = self._score(features, alive)
        count = self.keep_fraction(alive.sum(dim=-1))
        ranking = self._ranking(score, count, alive, features)
        if last_of:
            ranking = _last_first(ranking, last_of, by_grid=self.start.selector == "grid")
        gates = soft_top_k(ranking, count, self.gate_temperature, alive)
        # Open and closed are relative to the fullest gate of a row, so that there is always a
        # target.
        closed = gates < 0.5 * gates.amax(dim=-1, keepdim=True)
        # 2. What each token gives up, and to whom.
        slot = self._slot(ranking, closed)
        assignment = self._assignment(gates, closed, slot, features)
        # The mass that each token (column) gives up to each receiver (row).
        moved = (mass * (alive - gates)).unsqueeze(1) * assignment
        content, own = moved, torch.ones_like(mass)
        if self.start.weighting == "score":
            weight = transfer.importance(score)
            content, own = moved * weight.unsqueeze(1), 1 + self._fused(slot) * (weight - 1)
        # 3. The merge of ``transfer.merge``, for all tokens in place.
        share = (mass / (mass * own + content.sum(dim=-1))) ** self.start.exponent
        received = (content * (share / mass).unsqueeze(-1)).to(tokens.dtype) @ tokens
        reduced = tokens * (own * share).unsqueeze(-1).to(tokens.dtype) + received
        # 4. Reweighting, as far as the site is active.
        factor = 1 + self.activation.sigmoid() * self.reweight * score
        reduced = reduced * factor.unsqueeze(-1).to(tokens.dtype)
        return RelaxedOutput(reduced, gates, mass + moved.sum(dim=-1), score)

    def _score(self, features: Mapping[str, Tensor], alive: Tensor) -> Tensor:
        """Return the mixture of standardized scores [B, V]; dropped tokens do not count."""
        if not self.start.scores:
            return torch.zeros_like(alive)
        parts = []
        for name in self.start.scores:
            score = SCORES[name]
            inputs = [features[feature_name(need, self.start.observe)] for need in score.needs]
            part = score.function(*inputs, alive) if score.compares else score.function(*inputs)
            parts.append(standardize(part.expand_as(alive), alive))
        return combine(parts, self.scores.softmax(0))

    def _ranking(
        self, score: Tensor, count: Tensor, alive: Tensor, features: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the score [B, V] whose largest entries the selector keeps."""
        if self.start.selector == "top_k":
            return score
        # One step more than tokens stay, so that the gates next to the threshold are ranked as
        # well.
        steps = min(math.ceil(count.max().item()) + 1, score.shape[-1])
        if self.start.selector == "grid":
            return _grid_ranking(features["grid"], round(count.mean().item()), alive)
        if self.start.selector == "max_min":
            ranking = sequential.max_min_ranking(self._similarity(features), steps, alive)
            return standardize(ranking, alive)
        # Case: greedy. A closed gate is about -30, so dropped tokens are not picked.
        diversity = F.softplus(self.diversity)
        penalty = sequential.greedy_penalty(
            score + alive.clamp_min(LOG_FLOOR).log(), self._similarity(features), steps, diversity
        )
        return score - diversity * penalty

    def _similarity(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the mixture of similarities of all pairs, [B or 1, V, V]."""
        weights = dict(zip(self.start.similarity, self.similarity.softmax(0), strict=True))
        names = {kind: assign.SIMILARITIES[kind] for kind in weights}
        observe = self.start.observe
        compared = {kind: features[feature_name(name, observe)] for kind, name in names.items()}
        return assign.similarity(compared, weights)

    def _slot(self, ranking: Tensor, closed: Tensor) -> Tensor:
        """Return flags [B, V] of the residual token, the last one that the selector takes."""
        if not self.start.residual:
            return torch.zeros_like(ranking)
        last = ranking.masked_fill(closed, math.inf).argmin(dim=-1)
        return F.one_hot(last, ranking.shape[-1]).to(ranking.dtype)

    def _fused(self, slot: Tensor) -> Tensor:
        """Return how far the residual token is weighted as those that it takes in.

        At full gain it takes in nothing that others leave, so it is a kept token like any other.
        """
        return slot * self.activation.sigmoid() * (self.gain.sigmoid() < 1)

    def _assignment(
        self, gates: Tensor, closed: Tensor, slot: Tensor, features: Mapping[str, Tensor]
    ) -> Tensor:
        """Return g P plus the part of the residual token, [B, V, V]."""
        gain = self.gain.sigmoid()
        return gain * self._targets(gates, closed, features) + (1 - gain) * slot.unsqueeze(-1)

    def _targets(self, gates: Tensor, closed: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Return P [B, V, V]: how much of each token (column) goes to each other one (row)."""
        similarity = self._similarity(features).expand(gates.shape[0], -1, -1)
        itself = torch.eye(gates.shape[-1], dtype=torch.bool, device=gates.device)
        temperature = self.log_temperature.clamp(math.log(HARD / 10), math.log(SOFT * 10)).exp()
        sharpness = 1 / temperature
        if temperature >= SOFT:
            # Case: soft. Similarity has no effect on the value, only on the gradient.
            sharpness = sharpness - sharpness.detach()
        gate = gates.clamp_min(LOG_FLOOR).log().unsqueeze(-1)
        logits = sharpness * similarity + (1 + sharpness) * gate
        soft = logits.masked_fill(itself, torch.finfo(logits.dtype).min).softmax(dim=1)
        if temperature >= HARD:
            return soft
        # Case: hard. The value is that of the nearest open token, the gradient that of the softmax.
        open_only = similarity.masked_fill(closed.unsqueeze(-1) | itself, -math.inf)
        hard = F.one_hot(open_only.argmax(dim=1), gates.shape[-1]).mT.to(soft.dtype)
        return soft + (hard - soft).detach()


_RELAXED = tuple(name for name, selector in SELECTORS.items() if selector.relaxed)


def has_relaxed_form(reduction: Reduction) -> bool:
    """Return whether a reduction can be searched.

    It must have a single tier with a relaxed selector that picks one by one, keep the order of the
    image, assign by similarity to all kept tokens, and neither average, use raw weights nor keep
    the CLS token.
    """
    one_by_one = not reduction.tiers and reduction.options.get("at_once", 1) == 1
    in_order = reduction.order == "position" and not reduction.keep_class
    by_likeness = reduction.assignment == "similar" and reduction.receivers == "all"
    plain = not reduction.average and reduction.weighting != "raw"
    return reduction.selector in _RELAXED and one_by_one and in_order and by_likeness and plain


def _grid_ranking(places: Tensor, count: int, alive: Tensor) -> Tensor:
    """Rank the tokens by the grid's preference among those that are left in every row."""
    left = (alive.amin(dim=0) > 0.5).nonzero().squeeze(-1)
    ranking = torch.full_like(alive, -1.0)
    ranking[:, left] = grid.grid_preference(places[left], count).to(alive.dtype)
    return ranking


def _last_first(ranking: Tensor, images: int, *, by_grid: bool) -> Tensor:
    """Return the ranking [R, V] with the last token of a prompt's last image before all others.

    All anchors of a grid rank alike, so the last of them makes way for it.
    """
    place = torch.arange(ranking.shape[-1], device=ranking.device)
    row = torch.arange(ranking.shape[0], device=ranking.device).unsqueeze(-1)
    ending = row % images == images - 1
    if by_grid:
        last_anchor = torch.where(ranking >= 1, place, -1).amax(dim=-1, keepdim=True)
        ranking = torch.where(ending & (place == last_anchor), ranking.detach().amin(), ranking)
    first = ranking.detach().amax(dim=-1, keepdim=True) + AHEAD
    return torch.where(ending & (place == place[-1]), first, ranking)


def _parameter(value: float | list[float]) -> nn.Parameter:
    """Make a parameter in float32, whatever the default dtype is."""
    return nn.Parameter(torch.tensor(value, dtype=torch.float32))


def _logit(value: float) -> float:
    """Invert the sigmoid; 0 and 1 become saturated logits."""
    if value <= 0 or value >= 1:
        return SATURATED if value >= 1 else -SATURATED
    return math.log(value / (1 - value))


def _softplus_inverse(value: float) -> float:
    """Invert the softplus; 0 becomes a saturated value."""
    return value + math.log(-math.expm1(-value)) if value > 0 else -SATURATED


def _rounded(value: float) -> float:
    """Round to four decimals, and to exactly 0 or 1 where the difference is negligible."""
    for special in (0.0, 1.0):
        if abs(value - special) < NEGLIGIBLE:
            return special
    return round(value, 4)


def _snapped(temperature: float) -> float:
    """Round a temperature to four digits, or to 0 or infinity beyond `HARD` and `SOFT`."""
    if temperature < HARD:
        return 0.0
    return math.inf if temperature >= SOFT else float(f"{temperature:.4g}")


def _main(weights: Mapping[str, float]) -> dict[str, float]:
    """Round weights, and leave out negligible ones; a single weight becomes 1."""
    kept = {name: round(weight, 4) for name, weight in weights.items() if weight >= NEGLIGIBLE}
    return kept if len(weights) != 1 else dict.fromkeys(weights, 1.0)
