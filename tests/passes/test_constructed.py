"""The search finds what is known to be best, from its own starts: no preset, no variation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import constructed
import pytest
import torch
from constructed import Constructed
from torch import Tensor

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.run import SearchRun
from deos_fx.passes.search.search import search
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

# One seed in every run, the others where there is time.
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]
ALL_SEEDS = pytest.mark.parametrize("seed", SEEDS)


def found(problem: Constructed, steps: int, seed: int) -> Policy:
    """Return the policy that the search finds by its steps alone."""
    searched = SearchProblem.of(problem.model, problem.data, problem.budget, sites=problem.sites)
    run = SearchRun(searched, steps, seed, None, None)
    run.advance(["steps"])
    assert run.scoring.candidates, "a budget that is less than everything has places to try"
    return run.scoring.best.policy


def only(policy: Policy) -> Reduction:
    """Return the reduction of a policy that has one."""
    (reduction,) = policy.reductions
    return reduction


def likeness(reduction: Reduction, direction: Tensor) -> float:
    """Return the cosine of what a reduction looks at with a direction."""
    return torch.cosine_similarity(reduction.learned["probe"], direction, dim=0).item()


# *** how ***

HOW: dict[str, dict[str, Any]] = {
    "prune": {},
    "merge": {"gain": 1.0, "mass_bias": 1.0},
    "pool": {"gain": 1.0, "mass_bias": 1.0, "selector": "grid", "similarity": {"grid": 1.0}},
    "reweight": {"gain": 1.0, "mass_bias": 1.0, "weighting": "score", "sharpness": 10.0},
}


@pytest.mark.parametrize(
    ("make", "regime"),
    [
        (constructed.pruning, "prune"),
        (constructed.merging, "merge"),
        (constructed.pooling, "pool"),
        (constructed.weighting, "reweight"),
    ],
)
def test_only_one_regime_is_right(make: Callable[..., Constructed], regime: str) -> None:
    """With the right direction given, every regime but one fails."""
    problem = make(seed=1)
    count = problem.budget.visual_tokens
    assert isinstance(count, int)
    for name, settings in HOW.items():
        scores: dict[str, Any] = {"scores": {"novelty": 1.0}}
        if problem.directions:
            scores = {"learned": {"probe": 10 * problem.directions["mark"]}}
        if (regime, name) == ("merge", "reweight"):
            # Tokens of one type have weights alike, so these merge as well.
            continue
        if name == "pool":
            scores = {}
        elif not problem.directions:
            # Nothing to look for, so tokens that differ are kept.
            scores |= {"selector": "greedy", "diversity": 10.0}
        reduction = Reduction("projector", count, **(scores | settings))
        assert reduction.regime == name
        accuracy = problem.accuracy(Policy((reduction,)))
        assert accuracy > 0.95 if name == regime else accuracy < 0.9, name


@ALL_SEEDS
def test_prunes_where_all_but_a_few_marked_tokens_are_wrong(seed: int) -> None:
    problem = constructed.pruning(seed=seed)
    policy = found(problem, 80, seed)
    assert problem.accuracy(Policy()) < 0.2, "the unreduced model is misled by the wrong tokens"
    assert problem.accuracy(policy) > 0.95
    reduction = only(policy)
    assert (reduction.site, reduction.keep) == ("projector", 4)
    assert reduction.regime == "prune", "what moves from dropped tokens is wrong"
    assert likeness(reduction, problem.directions["mark"]) > 0.8


@ALL_SEEDS
def test_merges_where_frequencies_are_asked_for(seed: int) -> None:
    problem = constructed.merging(seed=seed)
    policy = found(problem, 60, seed)
    assert problem.accuracy(policy) > 0.95
    reduction = only(policy)
    assert (reduction.site, reduction.keep) == ("projector", 8)
    assert reduction.regime == "merge", "types must stay apart, and counts must stay what they are"
    assert reduction.mass_bias == pytest.approx(1, abs=0.3), "a mean counts tokens by their mass"


@ALL_SEEDS
def test_pools_where_only_neighbours_belong_together(seed: int) -> None:
    problem = constructed.pooling(seed=seed)
    policy = found(problem, 40, seed)
    assert problem.accuracy(policy) > 0.95
    reduction = only(policy)
    assert (reduction.site, reduction.keep) == ("projector", 4)
    assert reduction.regime == "pool", "the noise of a region cancels in its mean alone"


@ALL_SEEDS
def test_weights_where_one_token_must_be_a_mean_of_the_marked(seed: int) -> None:
    problem = constructed.weighting(seed=seed)
    policy = found(problem, 80, seed)
    assert problem.accuracy(policy) > 0.95
    reduction = only(policy)
    assert (reduction.site, reduction.keep) == ("projector", 1)
    # At a gain below 1, the one that stays counts a little more than the others: as good.
    assert reduction.regime in ("reweight", "mixed") and reduction.gain > 0.3, "one token is noise"
    assert reduction.weighting == "score", "a plain mean is that of the others"
    assert likeness(reduction, problem.directions["mark"]) > 0.8


# *** whether, where and how many ***


def test_reduces_nothing_where_everything_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "from_presets", lambda problem: [])
    monkeypatch.setattr(run_module, "_VARIATIONS", 0)
    problem = constructed.needing()
    assert problem.accuracy(Policy()) > 0.95
    settings = {"budget": problem.budget, "sites": problem.sites}
    result = search(problem.model, problem.data, steps=40, **settings)
    assert len(result.candidates) > 1, "reductions were tried"
    assert result.policy.is_empty, "each token that is dropped is asked for in some prompt"


@ALL_SEEDS
def test_waits_until_the_question_is_read(seed: int) -> None:
    problem = constructed.reading(seed=seed)
    policy = found(problem, 80, seed)
    assert problem.accuracy(policy) > 0.95
    reduction = only(policy)
    assert (reduction.site, reduction.keep) == ("decoder.1", 2)
    assert likeness(reduction, problem.directions["match"]) > 0.35


@ALL_SEEDS
def test_two_sites_share_a_budget(seed: int) -> None:
    problem = constructed.sharing(seed=seed)
    policy = found(problem, 120, seed)
    early, late = policy.reductions
    assert (early.site, late.site) == ("projector", "decoder.0")
    assert abs(early.count(36) - 8) <= 1, "as many as have marks"
    assert problem.accuracy(policy) > 0.8, "no single site can have more than half right"
    assert likeness(late, problem.directions["match"]) > 0.35
