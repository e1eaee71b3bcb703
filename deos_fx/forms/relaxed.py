"""The relaxed form of a reduction: it is differentiable.

Tokens that would be dropped may keep their places, all of them or the next ones of the ranking,
with gates near 0. Later attention gets the logarithm of a gate as a bias; hidden states are never
multiplied by gates, because a norm would undo that. With saturated parameters, the result on the
kept tokens is that of the static form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deos_fx.forms.needs import feature_name
from deos_fx.forms.parameters import (
    HARD,
    SOFT,
    diversity_of,
    in_range,
    sharpness_of,
    sizes_of,
)
from deos_fx.forms.rankings import grid_ranking, last_first
from deos_fx.forms.relaxed_parameters import RelaxedParameters
from deos_fx.forms.soft_top_k import soft_top_k
from deos_fx.operator import assign, sequential, transfer
from deos_fx.operator.gather import take
from deos_fx.operator.learned import LEARNED, projected
from deos_fx.operator.scores import LOG_FLOOR, SCORES, combine, standardize

__all__ = ["RelaxedOutput", "RelaxedReduction"]


class RelaxedOutput(NamedTuple):
    """Result of a relaxed reduction, for the C tokens that it leaves.

    Attributes:
        tokens: [B, C, d].
        kept: Indices [B, C] into the incoming tokens, ascending.
        alive: Gates [B, C], at most the incoming ones; later attention gets the bias log(alive).
        mass: [B, C]; masses of tokens with a closed gate have no meaning.
        score: Standardized [B, V]; zeros if no scores are used.
    """

    tokens: Tensor
    kept: Tensor
    alive: Tensor
    mass: Tensor
    score: Tensor


class RelaxedReduction(RelaxedParameters):
    """A reduction whose parameters are learned: see `RelaxedParameters` for these.

    A dropped token moves the part of it that its gate loses, alive - alive'. This part is assigned
    to the other tokens by softmax_i(a_ij / tau + (1 + 1 / tau) log alive'_i). With gates that are
    open or closed this is the static assignment at every temperature; a half open token is less of
    a target at low temperatures and receives half at high ones.
    """

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
        # 1. The ranking, gates that sum to the expected count, and the tokens that stay.
        score = self._score(features, alive)
        count = self.keep_fraction(alive.sum(dim=-1))
        ranking = self._ranking(score, count, alive, features)
        if last_of:
            ranking = last_first(ranking, last_of, by_grid=self.start.selector == "grid")
        if self.gates == "gumbel":
            # Noise, so that each step tries another choice.
            noise = -torch.rand_like(ranking).clamp_min(LOG_FLOOR).log()
            ranking = ranking - self.gate_temperature * noise.clamp_min(LOG_FLOOR).log()
        gates = self._gates(ranking, count, alive)
        stay = self._stay(ranking, count, alive)
        own_gates, own_mass = take(gates, stay), take(mass, stay)
        # Open and closed are relative to the fullest gate of a row, so that there is always a
        # target.
        closed = own_gates < 0.5 * own_gates.amax(dim=-1, keepdim=True)
        # 2. What each token gives up, and to whom.
        slot = self._slot(take(ranking, stay), closed)
        assignment = self._assignment(own_gates, closed, slot, stay, alive, features)
        # The mass that each token (column) gives up to each receiver (row).
        moved = (mass * (alive - gates)).unsqueeze(1) * assignment
        content, own = moved, torch.ones_like(own_mass)
        if self.start.weighting == "score":
            weight = transfer.importance(score, sharpness_of(self.log_sharpness))
            content = moved * weight.unsqueeze(1)
            own = 1 + self._fused(slot) * (take(weight, stay) - 1)
        # 3. The merge of ``transfer.merge``.
        share = (own_mass / (own_mass * own + content.sum(dim=-1))) ** self.start.exponent
        received = (content * (share / own_mass).unsqueeze(-1)).to(tokens.dtype) @ tokens
        reduced = take(tokens, stay) * (own * share).unsqueeze(-1).to(tokens.dtype) + received
        # 4. Reweighting, as far as the site is active.
        factor = 1 + self.activation.sigmoid() * in_range("reweight", self.reweight) * take(
            score, stay
        )
        reduced = reduced * factor.unsqueeze(-1).to(tokens.dtype)
        return RelaxedOutput(reduced, stay, own_gates, own_mass + moved.sum(dim=-1), score)

    def _score(self, features: Mapping[str, Tensor], alive: Tensor) -> Tensor:
        """Return the mixture of standardized scores [B, V]; dropped tokens do not count."""
        total = torch.zeros_like(alive)
        if self.start.scores:
            named = self.named_scores(features, alive)
            parts = [standardize(part.expand_as(alive), alive) for _, part in named]
            fades = bool(self.start.learned.scores)
            sizes = sizes_of(self.scores) if fades else self.scores.softmax(0)
            total = combine(parts, sizes)
        for _, part in self.learned_scores(features):
            total = total + part
        return standardize(total, alive) if self.start.learned.scores else total

    def named_scores(
        self, features: Mapping[str, Tensor], alive: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value [B or 1, V] of every score that is not learned."""
        for name in self.start.scores:
            score = SCORES[name]
            inputs = self._inputs(score.needs, features)
            yield name, score.function(*inputs, *([alive] if score.compares else []))

    def learned_scores(self, features: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value [B or 1, V] of every score that is learned."""
        for name in self.start.learned.scores:
            row = LEARNED[name]
            yield name, row.function(*self._inputs(row.needs, features), self.learned[name])

    def _inputs(self, needs: Iterable[str], features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return features as the site observes them."""
        return [features[feature_name(need, self.start.observe)] for need in needs]

    def _ranking(
        self, score: Tensor, count: Tensor, alive: Tensor, features: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the score [B, V] whose largest entries the selector keeps."""
        if self.start.selector == "top_k":
            return score
        # One step more than tokens stay open, so that the gates next to the threshold are ranked as
        # well, or as many steps as there are runners-up.
        more = max(self.runners_up or 0, 1)
        steps = min(math.ceil(_sizes(count).max().item()) + more, score.shape[-1])
        if self.start.selector == "grid":
            return grid_ranking(features["grid"], round(_sizes(count).mean().item()), alive)
        similarity = self._similarity(features, alive)
        if self.start.selector == "max_min":
            ranking = sequential.max_min_ranking(similarity, steps, alive)
            return standardize(ranking, alive)
        # Case: greedy. A closed gate is about -30, so dropped tokens are not picked.
        diversity = diversity_of(self.diversity)
        penalty = sequential.greedy_penalty(
            score + alive.clamp_min(LOG_FLOOR).log(), similarity, steps, diversity
        )
        return score - diversity * penalty

    def _gates(self, ranking: Tensor, count: Tensor, alive: Tensor) -> Tensor:
        """Return the gates [B, V] of the ranking."""
        gates = soft_top_k(ranking, count, self.gate_temperature, alive)
        if self.gates == "soft":
            return gates
        # Case: the choice of the static form, with the gradient of the soft gates.
        number = max(1, round(_sizes(count).mean().item()))
        best = ranking.masked_fill(alive < 0.5, -math.inf).topk(number, dim=-1).indices
        return torch.zeros_like(gates).scatter(1, best, 1.0) + gates - gates.detach()

    def _stay(self, ranking: Tensor, count: Tensor, alive: Tensor) -> Tensor:
        """Return the indices [B, C] of the tokens that stay, ascending."""
        present = ranking.shape[-1]
        if self.runners_up is None:
            return torch.arange(present, device=ranking.device).expand_as(ranking)
        number = min(present, math.ceil(_sizes(count).max().item() - 1e-3) + self.runners_up)
        left = ranking.detach() + alive.detach().clamp_min(LOG_FLOOR).log()
        return left.topk(number, dim=-1).indices.sort(dim=-1).values

    def _similarity(
        self, features: Mapping[str, Tensor], alive: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Return the mixture of similarities of tokens (all, or some rows) with all, [B, R, V]."""
        weights = dict(zip(self.start.similarity, self.similarity.softmax(0), strict=True))
        compared = {}
        for kind in weights:
            (feature,) = self._inputs([assign.SIMILARITIES[kind]], features)
            if kind == "centred":
                feature = assign.centred(feature, alive)
            elif kind == "learned":
                feature = projected(feature, self.learned["metric"])
            elif kind == "grid" and rows is not None and feature.dim() == 2:
                feature = feature.expand(len(rows), -1, -1)
            compared[kind] = feature
        return assign.similarity(compared, weights, rows)

    def _slot(self, ranking: Tensor, closed: Tensor) -> Tensor:
        """Return flags [B, C] of the residual token, the last one that the selector takes."""
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
        self,
        gates: Tensor,
        closed: Tensor,
        slot: Tensor,
        stay: Tensor,
        alive: Tensor,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """Return g P plus the part of the residual token, [B, C, V]."""
        gain = self.gain.sigmoid()
        targets = self._targets(gates, closed, stay, alive, features)
        return gain * targets + (1 - gain) * slot.unsqueeze(-1)

    def _targets(
        self,
        gates: Tensor,
        closed: Tensor,
        stay: Tensor,
        alive: Tensor,
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """Return P [B, C, V]: how much of each token (column) goes to each that stays (row)."""
        present = features["tokens"].shape[1]
        itself = stay.unsqueeze(-1) == torch.arange(present, device=stay.device)
        temperature = self.log_temperature.clamp(math.log(HARD / 10), math.log(SOFT * 10)).exp()
        similarity = self._similarity(features, alive, stay)
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


def _sizes(count: Tensor) -> Tensor:
    """Return expected counts [B] to size tensors by: 1 where damaged data have made one NaN.

    The loss is NaN then, which is what tells a search.
    """
    return count.detach().nan_to_num(nan=1.0)
