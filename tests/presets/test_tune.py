"""Tuning the options of a preset: published first, then better, within the evaluations."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from tiny import shared_llava

from deos_fx import presets
from deos_fx.policy.policy import Policy


def depth(policy: Policy) -> int:
    return int(policy.reductions[0].site.partition(".")[2] or -1)


needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="the extra [compare] is not installed"
)


@needs_optuna
def test_the_best_of_all_settings_is_found() -> None:
    model = shared_llava()
    # Five layers, of which the third is best: few enough to try all.
    tuned = presets.tune("fastv", 60, model, lambda p: abs(depth(p) - 2), 20)
    assert depth(tuned.policy) == 2 and tuned.values == {"layer": 3} and tuned.loss == 0
    assert tuned.policy == presets.fit("fastv", 60, model, layer=3)
    # Equal policies are evaluated once, so no more than there are.
    assert tuned.evaluations == len(tuned.losses) <= 5
    # The published setting comes first.
    assert tuned.losses[0] == 2


@needs_optuna
def test_continuous_options_come_near_the_best() -> None:
    def loss(policy: Policy) -> float:
        return (policy.reductions[0].temperature - 0.4) ** 2 + policy.reductions[0].mass_bias

    tuned = presets.tune("redistribute", 16, shared_llava(), loss, 80)
    assert tuned.evaluations == 80
    assert tuned.loss == min(tuned.losses) == loss(tuned.policy) < tuned.losses[0] / 2


@needs_optuna
def test_seeds_repeat_and_differ() -> None:
    def losses(seed: int) -> tuple[float, ...]:
        loss = lambda p: p.reductions[0].temperature  # noqa: E731
        return presets.tune("redistribute", 16, shared_llava(), loss, 6, seed=seed).losses

    assert losses(1) == losses(1) != losses(2)


@needs_optuna
def test_settings_that_the_model_cannot_run_are_passed_over() -> None:
    def loss(policy: Policy) -> float:
        if depth(policy) == 2:
            raise ValueError("no such site")
        return -depth(policy)

    tuned = presets.tune("fastv", 60, shared_llava(), loss, 20)
    assert depth(tuned.policy) == 4 and tuned.evaluations == 4


@needs_optuna
def test_a_budget_that_only_some_layers_meet() -> None:
    tuned = presets.tune("fastv", 16, shared_llava(), lambda p: -depth(p), 10)
    assert depth(tuned.policy) == 0


@pytest.mark.parametrize(("name", "evaluations"), [("divprune", 9), ("random", 9), ("fastv", 1)])
def test_one_evaluation(name: str, evaluations: int) -> None:
    tuned = presets.tune(name, 16, shared_llava(), lambda p: 1.0, evaluations)
    assert tuned.losses == (1.0,)
    assert tuned.policy == presets.fit(name, 16, shared_llava())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="evaluations is 0; give a whole number"):
        presets.tune("fastv", 16, shared_llava(), lambda p: 1.0, 0)
    with pytest.raises(ValueError, match="cannot meet"):
        presets.tune("fastv", 2, shared_llava(), lambda p: 1.0, 9)


def test_missing_optuna_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'deos-fx\[compare\]'"):
        presets.tune("fastv", 16, shared_llava(), lambda p: 1.0, 2)
