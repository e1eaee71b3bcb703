"""A reduction with every learned part, for the widths of `tiny_llava`."""

from __future__ import annotations

import torch

from deos_fx.policy.learned import Learned
from deos_fx.policy.reduction import Reduction

TOWER, DECODER = 48, 64


def learned_at(site: str, count: int) -> Reduction:
    """A reduction at a site that uses everything that can be learned."""
    in_tower = site.startswith("vision")
    width = TOWER if in_tower else DECODER
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "probe": (width,),
        "quadratic": (width, 4),
        # In the tower, the words of the prompt have another width than the tokens.
        "text": (width + DECODER, 3),
        "place": (2, 3),
        "metric": (width, 5),
    }
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Reduction(
        site,
        count,
        scores={"key_norm": 1.0} if in_tower else {"feature_norm": 1.0, "text_relevance": 1.0},
        selector="greedy",
        diversity=1.0,
        gain=0.8,
        temperature=0.1,
        similarity={"feature": 1.0, "centred": 1.0, "learned": 1.0},
        weighting="score",
        sharpness=2.0,
        mass_bias=0.5,
        learned=Learned(parts),
    )
