"""Small variations of a policy, to polish the best candidates in their static form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deos_fx.policy import Policy
from deos_fx.reduction import Reduction, split_site

__all__ = ["variations"]

# One change at a time; counts are fitted to the limits again afterwards.
_TREATMENTS: tuple[dict[str, Any], ...] = (
    {"gain": 0.0, "temperature": 0.0, "mass_bias": 0.0, "residual": False, "weighting": "one"},
    {"gain": 1.0, "temperature": 0.0, "mass_bias": 1.0},
    {"gain": 1.0, "temperature": 0.0, "mass_bias": 0.0},
    {"gain": 1.0, "temperature": 0.1, "mass_bias": 1.0},
    {"gain": 1.0, "temperature": math.inf, "mass_bias": 0.0},
)
_POSITIONS = ({"position": "keep"}, {"position": "compact"})
_SHARES = (0.5, 0.75, 1.5, 2.0)


def variations(policy: Policy, decoder_layers: int, visual_tokens: int) -> Iterator[Policy]:
    """Policies that differ from one in a single respect.

    In this order: the share of tokens between two sites, the treatment of what is dropped, the
    depth of a site, the rule for positions, one site less.

    Args:
        policy: Where to start.
        decoder_layers: Decoder layers of the model.
        visual_tokens: Visual tokens of one image.

    Yields:
        Policies whose counts may miss the limits.
    """
    for changed in _changed_reductions(policy, decoder_layers, visual_tokens):
        try:
            yield replace(policy, reductions=changed)
        except ValueError:
            # Two reductions at one site, or a grid behind another selector: not a policy.
            continue


def _changed_reductions(
    policy: Policy, decoder_layers: int, visual_tokens: int
) -> Iterator[tuple[Reduction, ...]]:
    reductions = policy.reductions
    counts = policy.counts(visual_tokens)
    for i in range(len(reductions) if len(reductions) > 1 else 0):
        for share in _SHARES:
            most = counts[i - 1] if i else visual_tokens
            least = counts[i + 1] if i + 1 < len(counts) else 1
            count = min(most, max(least, round(share * counts[i])))
            if count != counts[i]:
                yield _with(reductions, i, keep=count)
    for i, reduction in enumerate(reductions):
        for change in _TREATMENTS + _POSITIONS:
            if any(getattr(reduction, name) != value for name, value in change.items()):
                yield _with(reductions, i, **change)
        stage, layer = split_site(reduction.site)
        for moved in (layer - 1, layer + 1) if stage == "decoder" else ():
            if 0 <= moved < decoder_layers - 1:
                yield _with(reductions, i, site=f"decoder.{moved}")
    for i in range(len(reductions) if len(reductions) > 1 else 0):
        yield reductions[:i] + reductions[i + 1 :]


def _with(reductions: tuple[Reduction, ...], i: int, **change: Any) -> tuple[Reduction, ...]:
    return (*reductions[:i], replace(reductions[i], **change), *reductions[i + 1 :])
