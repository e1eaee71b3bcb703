"""The commands that compare and ablate searches run, count alike and resume; not what they find."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tiny import VOCABULARY, inputs, tiny_llava

from benchmarks.search import ablations, cases, charts, compare, front, methods, step
from benchmarks.search.depthwise import _cheapest
from benchmarks.search.task import Task
from deos_fx.passes.search import run as run_module
from deos_fx.policy.policy import Policy

QUICK = compare.Settings(budgets=(0.25,), seeds=(0,), questions=6, tests=2)


class TinyTask(Task):
    """Random prompts to a random model, of which no question is ever answered right or wrong."""

    def data(self, questions, seed, *, labels=True):
        batches = []
        for i in range(4):
            torch.manual_seed(100 * seed + i)
            batch = inputs(self.model, batch=2)
            batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
            if labels:
                batch["labels"] = torch.full_like(batch["input_ids"], -100)
                batch["labels"][:, -2:] = torch.randint(1, VOCABULARY - 10, (2, 2))
            batches.append(batch)
        return batches

    def accuracy(self, policy: Policy, tests: int):
        return {"overall": 0.5, "other": 0.5}


@pytest.fixture(scope="module")
def task() -> TinyTask:
    return TinyTask(tiny_llava(layers=3), None, None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_TRIAL", 1)
    monkeypatch.setattr(run_module, "_PAIRS", 0)
    monkeypatch.setattr(run_module, "_VARIATIONS", 2)
    for module in (methods, cases):
        monkeypatch.setattr(module, "default_steps", lambda problem: 2)


def test_searches_get_equal_numbers_of_evaluations_and_resume(task, quick):
    pytest.importorskip("optuna")
    saved: list[int] = []
    names = [name for name in methods.METHODS if name != f"tpe-x{methods.LONG}"]
    settings = compare.Settings(**vars(QUICK) | {"methods": names})
    runs = compare.compare(settings, task, [], lambda runs: saved.append(len(runs)))
    assert saved == list(range(1, len(names) + 1))
    allowed = next(run["evaluations"] for run in runs if run["method"] == "gradient")
    for run in runs:
        assert run["policy"] and run["loss"] > 0 and run["tokens"] == 16
        if run["method"] not in ("gradient", "both"):
            assert 0 < run["evaluations"] <= allowed
    # What blind searches report is the lowest loss that they have seen.
    for run in runs:
        losses = [loss for _, loss in run["trace"]]
        assert losses == sorted(losses, reverse=True) and (not losses or losses[-1] == run["loss"])
    # Everything is in the results, so nothing is run again.
    again = json.loads(json.dumps(runs))
    assert compare.compare(settings, task, again, lambda runs: saved.append(0)) == again
    assert 0 not in saved
    text = compare.table(runs)
    assert text.count("\n") == len(names) + 1 and "50.0" in text
    assert charts.comparison_chart(runs).lstrip().startswith("<?xml")


def test_gradient_comes_first(task):
    settings = compare.Settings(**vars(QUICK) | {"methods": ["polish"]})
    with pytest.raises(ValueError, match="run that first"):
        compare.compare(settings, task, [], lambda runs: None)
    with pytest.raises(ValueError, match="choose from"):
        compare.compare(compare.Settings(methods=["luck"]), task, [], lambda runs: None)


def test_an_evaluation_is_a_pass_and_a_backward_counts_two(task, quick):
    problem = task.problem(16, 6, 0)
    run = run_module.SearchRun(problem, 3, 0, None, None)
    starts = run.places(problem.searched_sites())
    before = problem.effort.evaluations
    run.descend("steps", starts[0], 3)
    # Three steps on all three batches; judged at the start, after each step and when rounded.
    assert problem.effort.evaluations - before == 3 * 3 * 3 + (1 + 3 + 1) * len(problem.scoring)


@pytest.mark.parametrize("name", cases.CASES)
def test_ablations(task, quick, monkeypatch, name):
    few = cases.Settings(seeds=(0,), questions=6, tests=2, tokens=16, steps=2)
    made = cases.CASES[name]

    # One case of each name is enough here, at limits that the tiny model can meet.
    def some(task, settings):
        seen: set[str] = set()
        for case in made(task, settings):
            if case.name not in seen:
                seen.add(case.name)
                yield case

    monkeypatch.setitem(cases.CASES, name, some)
    rows = ablations.ablate(name, task, few, [], lambda rows: None)
    assert len(rows) >= 1 and all(row["loss"] > 0 for row in rows)
    assert ablations.ablate(name, task, few, list(rows), lambda rows: None) == rows
    assert ablations.table(rows).count("\n") == len(rows) + 1
    assert re.search("<svg", ablations.PLOTS[name](rows))


def test_a_front_is_compared_with_separate_searches(task, quick):
    settings = front.Settings(budgets=(32, 16), questions=6, tests=2, steps=2)
    rows = front.measure(task, settings)
    assert [(row["way"], row["tokens"]) for row in rows] == [
        (way, tokens) for way in ("together", "one by one") for tokens in (32, 16)
    ]
    assert all(row["evaluations"] > 0 and row["right"] == 50 for row in rows)
    together = sum(row["evaluations"] for row in rows[:2])
    # The second line is that of the searches together.
    assert front.table(rows).splitlines()[2].endswith(f"| {together:,} |")


def test_a_step_is_measured_beside_passes_of_the_model():
    rows = step.measure(step.Settings("llava-tiny", text=8, budget=0.5, repeats=1))
    names = [row["name"] for row in rows]
    assert names[:3] == ["forward", "backward", "step at projector"] and len(names) == 5
    assert rows[0]["forwards"] == rows[1]["backwards"] == 1
    assert all(row["seconds"] > 0 for row in rows)
    assert all(row["first_forwards"] > 0 for row in rows[2:])


def test_a_step_of_an_unknown_shape():
    with pytest.raises(ValueError, match="llava-1.5-eighth"):
        step.measure(step.Settings("llava-2"))


def test_no_such_ablation(task):
    with pytest.raises(ValueError, match="choose from constraints"):
        ablations.ablate("luck", task, cases.Settings(), [], lambda rows: None)


def test_depths_of_groups_are_the_cheapest_that_fit():
    """Against trying all choices."""
    counts, sites, layers = [8, 4, 2, 1], ["projector", "decoder.0", "decoder.1"], 4
    torch.manual_seed(0)
    losses = {(n, s): float(x) for n in counts for s, x in zip(sites, torch.rand(3), strict=True)}
    depths = [*sites, None]
    through = {"projector": 0, "decoder.0": 1, "decoder.1": 2, None: layers}

    def total(choice):
        groups = zip(counts, counts[1:], choice, strict=False)
        return sum(0 if s is None else losses[b, s] - losses[a, s] for a, b, s in groups)

    def spent(choice):
        groups = zip(counts, counts[1:], choice, strict=False)
        return layers + sum((a - b) * through[s] for a, b, s in groups)

    for limit in (4, 7, 12, 20, 32):
        options = [
            (depths[i], depths[j], depths[k])
            for i in range(4)
            for j in range(i, 4)
            for k in range(j, 4)
        ]
        best = min((o for o in options if spent(o) <= limit), key=total)
        found = _cheapest(counts, sites, losses, layers, limit)
        assert spent(found) <= limit and total(found) == pytest.approx(total(best))
