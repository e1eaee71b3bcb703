"""What is learned of a relaxed reduction, and the static forms that it starts from and ends in.

Settings of a policy have ranges; here they are unbounded numbers, which gradient steps can move.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

from torch import Tensor, nn

from deos_fx.forms.parameters import (
    HARD,
    SOFT,
    diversity_of,
    in_range,
    logit,
    main_parts,
    mass_bias_of,
    parameter,
    rounded,
    sharpness_of,
    sizes_of,
    snapped,
    softplus_inverse,
)
from deos_fx.operator.learned import LEARNED
from deos_fx.operator.scores import SCORES
from deos_fx.operator.select import SELECTORS
from deos_fx.policy.learned import Learned
from deos_fx.policy.reduction import Reduction

__all__ = ["RelaxedParameters", "has_relaxed_form"]


class RelaxedParameters(nn.Module):
    """The parameters of a reduction, as they are learned.

    The starting point says which scores and similarities are mixed, and fixes the settings that are
    not learned: selector, weighting, exponent, residual and position. The learned parameters, each
    an unbounded number, are:

    1. ``activation`` a and ``retention`` r (through a sigmoid): the gates of a row sum to
       (1 - a (1 - r)) times the incoming ones, so an inactive site (a = 0) is the identity;
    2. ``scores`` and ``similarity`` weights (softmax); beside learned scores, the mix of the others
       may also grow or fade as a whole, which in a policy is the length of the learned ones;
    3. ``diversity`` and ``mass_bias`` (softplus), ``gain`` (sigmoid), ``log_temperature`` and
       ``log_sharpness`` (exponential) and ``reweight`` (as it is);
    4. the tensors of ``learned``, which are as they are in a policy.

    Attributes:
        gate_temperature: Width of the gates' transition, in standard deviations of the score; the
            search lowers it.
        runners_up: How many tokens stay in the sequence besides the K that the policy would keep,
            the next ones of the ranking, so that their gates have gradients. None if all stay.
        gates: ``soft``; ``hard`` for gates of 0 and 1 with the gradient of the soft ones; or
            ``gumbel``, the same with Gumbel noise of the gates' width on the ranking.
    """

    def __init__(
        self,
        start: Reduction,
        *,
        activation: float,
        retention: float,
        gate_temperature: float = 0.5,
        runners_up: int | None = None,
        gates: str = "soft",
    ) -> None:
        super().__init__()
        if not has_relaxed_form(start):
            raise ValueError(
                f"{start} has no relaxed form, so it cannot be searched; start from one with a "
                f"single tier of {', '.join(_RELAXED)}, in the order of the image"
            )
        self.start = start
        self.gate_temperature = gate_temperature
        self.runners_up = runners_up
        self.gates = gates
        self.activation = parameter(logit(activation))
        self.retention = parameter(logit(retention))
        self.scores = parameter([math.log(weight) for weight in start.scores.values()])
        self.similarity = parameter([math.log(weight) for weight in start.similarity.values()])
        self.diversity = parameter(softplus_inverse(start.diversity))
        self.gain = parameter(logit(start.gain))
        # A temperature of 0 or infinity becomes one that is surely hard or soft.
        temperature = min(max(start.temperature, HARD / 10), SOFT * 10)
        self.log_temperature = parameter(math.log(temperature))
        self.log_sharpness = parameter(math.log(max(start.sharpness, HARD)))
        self.reweight = parameter(start.reweight)
        self.mass_bias = parameter(softplus_inverse(start.mass_bias))
        self.learned = nn.ParameterDict(
            {name: nn.Parameter(value.clone()) for name, value in start.learned.items()}
        )

    @classmethod
    def from_reduction(cls, reduction: Reduction, fraction: float) -> Self:
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
        # A learned similarity goes with its directions.
        scores, kinds = main_parts(scores), main_parts(kinds)
        # The weights of a policy sum to 1, so learned scores take over the scale of the mix.
        scale = sizes_of(self.scores).sum().item() if self.start.scores else 1.0
        scale = rounded(scale) or scale
        learned = {
            name: value.detach() / scale ** (1 / LEARNED[name].degree)
            for name, value in self.learned.items()
            if LEARNED[name].scores or "learned" in kinds
        }
        diversity = rounded(diversity_of(self.diversity).item())
        greedy = self.start.selector == "greedy" and diversity > 0
        # Greedy without diversity is top_k, which is cheaper.
        plain = self.start.selector == "greedy" and not greedy
        selector = "top_k" if plain else self.start.selector
        # Options of a selector or score that has dropped out go with it.
        known = {*SELECTORS[selector].options}.union(*(SCORES[name].options for name in scores))
        gain = rounded(self.gain.sigmoid().item())
        by_score = self.start.weighting == "score"
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
            temperature=snapped(temperature) if gain else 0.0,
            sharpness=rounded(sharpness_of(self.log_sharpness).item()) if by_score else 1.0,
            reweight=rounded(in_range("reweight", self.reweight).item()) if scores else 0.0,
            mass_bias=rounded(mass_bias_of(self.mass_bias).item()),
            learned=Learned(learned),
        )

    def keep_fraction(self, before: Tensor | float = 1.0) -> Tensor:
        """Return the fraction of original tokens alive after the site, given that before it."""
        return before * (1 - self.activation.sigmoid() * (1 - self.retention.sigmoid()))

    def bias_after(self, before: Tensor | float = 0.0) -> Tensor:
        """Return beta for the log-mass bias of later attention, given that of the sites before.

        The last active site decides: beta' = (1 - a) beta + a beta_site.
        """
        activation = self.activation.sigmoid()
        return (1 - activation) * before + activation * mass_bias_of(self.mass_bias)


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
