"""Searches under several budgets: they share work, and no policy of theirs is dominated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searches import labelled, small_model

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search import search as search_module
from deos_fx.passes.search.budgets import in_words, loosest_first, pooled
from deos_fx.passes.search.objective import Effort
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.search import search
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_front import SearchFront
from deos_fx.results.search_result import Candidate

SHARES = (0.2, 0.5, 0.35, 0.1)
BUDGETS = [Budget(visual_tokens=share) for share in SHARES]
STEPS = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def efforts() -> Any:
    """What the searches of this file have cost, one after the other."""
    return []


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, efforts: list[Effort]) -> None:
    monkeypatch.setattr(run_module, "_TRIAL", 4)
    monkeypatch.setattr(run_module, "_VARIATIONS", 4)
    make = SearchProblem.of

    def counted(*arguments: Any, **options: Any) -> SearchProblem:
        problem = make(*arguments, **options)
        efforts.append(problem.effort)
        return problem

    monkeypatch.setattr(search_module.SearchProblem, "of", counted)


def dominates(first: Candidate, second: Candidate) -> bool:
    pairs = [(first.loss, second.loss)]
    pairs += zip(first.cost.amounts.values(), second.cost.amounts.values(), strict=True)
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def test_a_front_costs_less_than_half_of_its_searches(
    model: Any, efforts: list[Effort], tmp_path: Path
) -> None:
    # Those of other tests may be there.
    efforts.clear()
    data = labelled(model)
    stages: list[str] = []
    show: Any = lambda now, *_: stages.append(now)  # noqa: E731
    front = search(model, data, budgets=BUDGETS, steps=STEPS, progress=show)
    alone = [search(model, data, budget=budget, steps=STEPS) for budget in BUDGETS]
    own, *others = (effort.evaluations for effort in efforts)
    assert own < sum(others) / 2
    # Each result says what was spent for it, after those before it.
    assert sum(each.evaluations for each in front.results.values()) == own
    assert [each.evaluations for each in alone] == others
    # Every policy is within its budget, the loosest first; none of them is dominated.
    assert isinstance(front, SearchFront)
    assert list(front.results) == [Budget(visual_tokens=share) for share in sorted(SHARES)[::-1]]
    for budget, result in front.results.items():
        assert result.best.cost.visual_tokens <= 64 * (budget.visual_tokens or 0)
        assert result.limits == alone[BUDGETS.index(budget)].limits
        assert result.unreduced_loss == alone[0].unreduced_loss
    best = [result.best for result in front.results.values()]
    assert not any(dominates(one, other) for one in best for other in best)
    assert [each.loss for each in best] == sorted(each.loss for each in best)
    # Data is captured and places are tried once; the other budgets go on from there.
    assert stages.count("capture") == len(data) and stages.count("estimate") == 1
    assert {name.split(": ")[0] for name in stages if "place" in name} == {"visual_tokens=0.5"}
    assert all(f"visual_tokens={share}: steps" in stages for share in SHARES)
    sources = {each.source for each in front[BUDGETS[0]].candidates}
    assert "carried from a looser budget" in sources
    front.report(tmp_path / "front.html")
    page = (tmp_path / "front.html").read_text()
    assert "20.0 % visual tokens" in page and 'aria-label="Task loss of every policy' in page


def test_an_interruption_leaves_a_policy_for_every_budget(model: Any) -> None:
    def progress(now: str, done: int, total: int) -> None:
        if now == "visual_tokens=0.35: steps":
            raise KeyboardInterrupt

    budgets = BUDGETS[:3]
    sites = ["projector"]
    front = search(model, labelled(model), budgets=budgets, steps=2, sites=sites, progress=progress)
    assert front.interrupted and set(front.results) == set(budgets)
    for budget, result in front.results.items():
        assert result.best.cost.visual_tokens <= 64 * (budget.visual_tokens or 0)
    assert len(front[budgets[1]].history) == 2 and front[budgets[0]].history == []


def test_a_front_goes_on_from_its_checkpoint(model: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"budgets": BUDGETS[:2], "steps": 2, "sites": ["projector"]}
    first = search(model, labelled(model), checkpoint=tmp_path, **settings)
    stages: list[str] = []
    settings["progress"] = lambda now, *_: stages.append(now)
    again = search(model, labelled(model), checkpoint=tmp_path, **settings)
    assert again.results == first.results and len(again.policies) <= 2
    assert not any(now.endswith("steps") for now in stages)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["visual_tokens=0.2", "visual_tokens=0.5"]


def test_a_place_that_is_too_late_for_a_tighter_budget_is_not_carried_on(model: Any) -> None:
    # After the first of two layers, more than half of the tokens were processed.
    budgets = [Budget(visual_tokens=0.6), Budget(visual_tokens=0.2)]
    run = run_module.SearchRun(
        SearchProblem.of(model, labelled(model), budgets[1]), 2, 0, None, None
    )
    late = Policy((Reduction("decoder.0", 12, scores={"feature_norm": 1.0}),))
    early = Policy((Reduction("projector", 40, scores={"feature_norm": 1.0}),))
    run.reached = [late]
    assert run.carried() == []
    run.reached = [late, early]
    (start,) = run.carried()
    assert start.reductions[0].site == "projector" and list(start.counts(64)) == [12]


def test_budgets_are_sorted_by_their_tightest_limit(model: Any) -> None:
    problem = SearchProblem.of(model, labelled(model)[:1], BUDGETS[0])
    tight = Budget(visual_tokens=0.9, kv_cache=0.15)
    assert loosest_first(problem, [tight, *BUDGETS])[2:] == [BUDGETS[0], tight, BUDGETS[3]]
    assert in_words(tight) == "visual_tokens=0.9, kv_cache=0.15"
    assert problem.under(tight).effort is problem.effort


def test_the_cheaper_of_equal_policies_comes_first(model: Any) -> None:
    problem = SearchProblem.of(model, labelled(model)[:1], Budget(visual_tokens=0.5))
    steps = [Reduction("projector", keep, scores={"feature_norm": 1.0}) for keep in (48, 24, 12)]
    found = [
        Candidate(Policy((step,)), "steps", 1.0, problem.cost.predict(Policy((step,))))
        for step in steps
    ]
    # The first is too much, and the last comes twice.
    again = replace(found[2], source="again")
    assert pooled(problem, [*found, again]) == [found[2], found[1]]


def test_mistakes_in_budgets_are_refused(model: Any) -> None:
    data = labelled(model)[:1]
    either = "Give either budget, or budgets"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, TypeError, either),
        ({"budget": BUDGETS[0], "budgets": BUDGETS}, TypeError, either),
        ({"budgets": BUDGETS[0]}, TypeError, "one budget as budget="),
        ({"budgets": [0.5]}, TypeError, "budget is a float"),
        ({"budgets": []}, ValueError, "at least one budget"),
        ({"budgets": BUDGETS[:1] * 2}, ValueError, "each budget once"),
        ({"budgets": [Budget()]}, ValueError, "no limit"),
        # The tightest is looked at before the loosest is searched.
        ({"budgets": [*BUDGETS, Budget(flops=9)]}, ValueError, "No policy meets the limits"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            search(model, data, **given)
