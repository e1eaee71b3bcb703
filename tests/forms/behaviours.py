"""One reduction of every kind, for tests of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from site_inputs import TOKENS, WIDTH
from torch import Tensor

from deos_fx.forms.static import StaticOutput, static_reduce
from deos_fx.operator import SCORES
from deos_fx.policy.learned import Learned
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier


def learned(*names: str) -> Learned:
    """Learned parts of the right shapes for the random tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "probe": (WIDTH,),
        "quadratic": (WIDTH, 4),
        "text": (2 * WIDTH, 3),
        "place": (3, 2),
        "metric": (WIDTH, 3),
    }
    return Learned({name: torch.randn(*shapes[name], generator=generator) for name in names})


# One of every regime and selector, and mixtures of them.
BEHAVIOURS: dict[str, dict[str, Any]] = {
    "prune": {},
    "prune by a mixture": {"scores": {"novelty": 1, "key_norm": 2, "text_attention": 1}},
    "merge": {"gain": 1},
    "merge half by keys": {"gain": 0.5, "similarity": {"key": 1, "feature": 1}},
    "sum": {"gain": 1, "exponent": 0, "weighting": "score"},
    "pool": {"gain": 1, "selector": "grid", "similarity": {"grid": 1}},
    "soft grid": {"gain": 1, "selector": "grid", "similarity": {"grid": 1}, "temperature": 0.05},
    "grid prune": {"selector": "grid", "reweight": 0.2},
    "uniform": {"gain": 1, "temperature": math.inf},
    "redistribute": {"gain": 1, "temperature": 0.1},
    "reweight": {"reweight": 0.3},
    "greedy": {"selector": "greedy", "diversity": 0.7},
    "greedy merge": {"selector": "greedy", "diversity": 2.0, "gain": 1, "temperature": 0.2},
    "residual": {"residual": True},
    "residual by score": {"residual": True, "gain": 0.3, "weighting": "score", "exponent": 0},
    "residual without rest": {"residual": True, "gain": 1, "weighting": "score"},
    "max_min": {"selector": "max_min"},
    "max_min merge": {"selector": "max_min", "gain": 1, "similarity": {"key": 1, "feature": 2}},
    "by place": {"scores": {"random": 1}, "options": {"seed": 3}, "gain": 1, "weighting": "score"},
    "greedy by place": {
        "scores": {"grid_coverage": 1, "random": 1},
        "selector": "greedy",
        "diversity": 1.0,
        "similarity": {"key": 1},
    },
    "every score": {"scores": {name: 1 for name in SCORES}},
    "learned": {
        "scores": {"novelty": 1, "text_relevance": 2},
        "selector": "greedy",
        "diversity": 1.0,
        "gain": 0.8,
        "temperature": 0.05,
        "similarity": {"learned": 2, "feature": 1},
        "weighting": "score",
        "sharpness": 3.0,
        "learned": learned("probe", "quadratic", "text", "place", "metric"),
    },
    "learned alone": {"learned": learned("probe")},
    "centred": {"gain": 1, "similarity": {"centred": 1}},
    "everything": {
        "selector": "greedy",
        "diversity": 0.3,
        "gain": 0.4,
        "temperature": 0.07,
        "similarity": {"feature": 1, "key": 1, "grid": 1},
        "weighting": "score",
        "exponent": 0.6,
        "reweight": -0.1,
        "residual": True,
    },
}
AS_CHOSEN = {"order": "selection", "position": "compact"}

# Those without a relaxed form.
STATIC: dict[str, dict[str, Any]] = {
    "greedy in steps": {"selector": "greedy", "diversity": 0.7, "options": {"at_once": 3}},
    "max_min in steps": {"selector": "max_min", "options": {"at_once": 3}, "gain": 1},
    "determinantal": {
        "selector": "determinantal",
        "scores": {"text_relevance": 1},
        "similarity": {"feature": 1, "grid": 1},
    },
    "coverage": {"selector": "coverage", "gain": 1},
    "distinct": {"tiers": (Tier(keep=0.5, selector="distinct", options={"per_round": 7}),)},
    "probe": {
        "selector": "probe",
        "scores": {"key_l1_norm": 1},
        "options": {"image_pivots": 2, "text_pivots": 3},
    },
    "windows": {"selector": "windows", "options": {"windows": 9}, "gain": 1},
    "windows after": {
        "tiers": (
            Tier(keep=0.5, selector="windows", scores={"novelty": 1}, options={"windows": 4}),
        ),
    },
    "quota": {"selector": "quota", "options": {"windows": 5}, **AS_CHOSEN},
    "quota of a mixture": {
        "selector": "quota",
        "scores": {"novelty": 1, "key_norm": 1},
        "options": {"windows": 4},
        "reweight": 0.1,
    },
    "bipartite": {
        "selector": "bipartite",
        "options": {"first": 1},
        "similarity": {"key": 1},
        "gain": 1,
        "receivers": "last",
        **AS_CHOSEN,
    },
    "bipartite sorted": {"selector": "bipartite", "gain": 1, "receivers": "last"},
    "neighbourhood": {
        "selector": "neighbourhood",
        "scores": {"mutual_attention": 1},
        "observe": "vision.1",
        "options": {"share": 1.5},
        "tiers": (Tier(keep=1.0, scores={"mutual_attention": 1}, observe="next"),),
    },
    "contextual": {
        "tiers": (Tier(keep=0.25, selector="strided"),),
        "order": "tier",
        "position": "compact",
        "receivers": "last",
        "gain": 1,
        "similarity": {"key": 1},
        "average": True,
        "exponent": 0,
    },
    "contextual sorted": {
        "tiers": (Tier(keep=0.25, selector="strided"),),
        "receivers": "last",
        "gain": 1,
        "average": True,
    },
    "neighbours": {"gain": 1, "assignment": "k_nearest", "neighbours": 5},
    "neighbours and rest": {
        "tiers": (Tier(keep=0.5, selector="lattice", options={"step": 3}),),
        "gain": 0.5,
        "assignment": "k_nearest",
        "neighbours": 5,
        "similarity": {"joint_key": 1},
        "weighting": "raw",
        "exponent": 0,
        "residual": True,
        **AS_CHOSEN,
    },
    "fused by attention": {"residual": True, "weighting": "raw", "exponent": 0, **AS_CHOSEN},
    "rest into the last tier": {
        "tiers": (Tier(keep=0.25, selector="max_min"),),
        "receivers": "last",
        "gain": 0.5,
        "residual": True,
    },
    "interpolate": {"selector": "grid", "assignment": "window", "gain": 1},
    "grid and best": {"selector": "grid", "tiers": (Tier(keep=0.5),), "gain": 1},
    "three tiers": {
        "scores": {"random": 1},
        "tiers": (
            Tier(keep=0.25, selector="greedy", diversity=0.5, scores={"novelty": 1}),
            Tier(keep=0.25, scores={"key_norm": 1, "novelty": 1}, observe="next"),
        ),
        "gain": 1,
        "temperature": 0.3,
        "order": "tier",
        "position": "compact",
    },
}
LEAST = {"bipartite": TOKENS // 2, "bipartite sorted": TOKENS // 2}
LEAST |= {name: 4 for name, fields in STATIC.items() if "tiers" in fields}
COUNTS = [1, 4, 9, 18, 36]
WITH_CLASS_TOKEN = Reduction("vision.1", 5, keep_class=True, **AS_CHOSEN)
behaviours = pytest.mark.parametrize("behaviour", BEHAVIOURS | STATIC)
relaxed_behaviours = pytest.mark.parametrize("behaviour", BEHAVIOURS)


def reduction_of(behaviour: str, keep: int, site: str = "projector") -> Reduction:
    """A reduction that keeps so many tokens, or as few as this kind can."""
    return Reduction(site, max(keep, LEAST.get(behaviour, 1)), **(BEHAVIOURS | STATIC)[behaviour])


def reduce(
    reduction: Reduction, tokens: Tensor, mass: Tensor | None, features: dict[str, Tensor]
) -> StaticOutput:
    return static_reduce(reduction, reduction.count(TOKENS), tokens, mass, features)
