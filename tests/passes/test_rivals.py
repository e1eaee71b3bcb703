"""Presets that are tuned under the limits of a search, beside what it finds itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from searches import SHORT, labelled, small_model

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import fitted_preset
from deos_fx.passes.search.rivals import Rivals
from deos_fx.passes.search.scoring import Scoring
from deos_fx.passes.search.search import search
from deos_fx.policy.budget import Budget

QUARTER = Budget(visual_tokens=0.25)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def test_presets_get_no_more_evaluations_than_they_may_have(model: Any) -> None:
    problem = SearchProblem.of(model, labelled(model), QUARTER)
    seen: list[tuple[int, int]] = []
    scoring = Scoring(problem, Estimate(None), lambda _, *counts: seen.append(counts))
    before = problem.effort.evaluations
    rivals = Rivals(problem, scoring, 24, seed=0)
    rivals.add()
    measured = (problem.effort.evaluations - before) / len(problem.scoring)
    assert measured == rivals.evaluations == len(scoring.candidates) <= 24
    assert seen == [(i + 1, 24) for i in range(len(seen))]
    assert all(problem.meets(each.policy) for each in scoring.candidates)
    # Every candidate has the loss that its policy has by itself.
    best = scoring.best
    assert problem.static_loss(best.policy) == pytest.approx(best.loss, rel=1e-5)
    # All that fit are there, and of three there are other settings.
    sources = [each.source for each in scoring.candidates]
    published = {source for source in sources if not source.endswith(", tuned")}
    assert {"preset merge", "preset random", "preset visionzip"} <= published
    assert 1 <= len(set(sources) - published) <= 3
    assert fitted_preset(problem, "merge") in [each.policy for each in scoring.candidates]


def test_fewer_evaluations_than_presets_are_kept_to(model: Any) -> None:
    problem = SearchProblem.of(model, labelled(model), QUARTER)
    scoring = Scoring(problem, Estimate(None), None)
    rivals = Rivals(problem, scoring, 2, seed=0)
    rivals.add()
    assert rivals.evaluations == len(scoring.candidates) == 2


def test_tuning_presets_changes_nothing_but_what_the_result_is_beside(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SHORT.items():
        monkeypatch.setattr(run_module, name, value)
    options = {"budget": QUARTER, "steps": 2, "sites": ["projector"]}
    plain = search(model, labelled(model), **options)
    tuned = search(model, labelled(model), **options, preset_evaluations=22)
    own = [each for each in tuned.candidates if each in plain.candidates]
    assert len(own) >= len(plain.candidates) - 1 and tuned.history == plain.history
    assert (plain.preset_evaluations, 5 < tuned.preset_evaluations <= 22) == (0, True)
    assert "Presets have their published settings." in plain.basis
    tried = f"settings of their options were tried in {tuned.preset_evaluations} evaluations"
    assert tried in tuned.basis
    # Comparing the result with the best preset takes two losses, if that is not the result.
    assert abs(tuned.evaluations - plain.evaluations) <= 2 * len(labelled(model))
    presets = [each for each in tuned.candidates if each.source.startswith("preset ")]
    if tuned.best_preset is None:
        assert tuned.best.source == presets[0].source
    else:
        assert tuned.best_preset.loss == min(each.loss for each in presets)


def test_optuna_is_asked_for_before_anything_is_computed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'deos-fx\[compare\]'"):
        search(model, [], budget=QUARTER, preset_evaluations=5)
