"""The methods that the demo compares."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deos_fx import presets, reference
from deos_fx.cli import demo_methods
from deos_fx.cli.demo import run_demo
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy

BUDGET = Budget(visual_tokens=18)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRAINING": 48, "VALIDATION": 16, "TEST": 16, "LOSSES": 3}.items():
        monkeypatch.setattr(demo_methods, name, value)
    # Another test may have another amount of data.
    demo_methods._bench.cache_clear()


def test_presets_are_tuned_on_the_data_of_the_search(few: None) -> None:
    pytest.importorskip("optuna")
    found = demo_methods._tested(BUDGET, 0, "merge")
    # Three losses on the one batch that is held back.
    assert found.evaluations == 3
    assert len(found.method.answers) == 16 and 0 <= found.method.accuracy["overall"] <= 1
    assert found.method.cost.visual_tokens <= 18
    # The published setting is one of the three.
    bench = demo_methods._bench(BUDGET, 0)
    published = bench.problem.static_loss(presets.fit("merge", 18, bench.model))
    assert bench.problem.static_loss(found.method.policy) <= published


def test_a_preset_that_cannot_meet_the_budget_has_a_reason(few: None) -> None:
    found = demo_methods._tested(Budget(visual_tokens=1), 0, "fastv")
    assert found.method.reason and not found.method.accuracy and not found.evaluations


def test_presets_keep_their_published_settings_without_optuna(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise ImportError("Optuna is not installed")

    monkeypatch.setattr(demo_methods, "require_optuna", missing)
    found = demo_methods._tested(BUDGET, 0, "fastv")
    assert found.method.policy == presets.fit("fastv", 18, reference.load()[0])
    assert found.evaluations == 0


def test_the_process_of_the_presets_is_not_interrupted() -> None:
    before, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    try:
        demo_methods._begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        torch.set_num_threads(threads)


def test_a_failure_ends_the_process_of_the_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no folder."""
    from rich.console import Console

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("deos_fx.cli.demo.search", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_demo(tmp_path / "demo", 18, 0, Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_the_searched_policy_and_the_presets_answer_the_same_questions(few: None) -> None:
    model, processor = reference.load()
    tester = demo_methods.Tester(model, processor)
    assert tester.limit(Budget(visual_tokens=0.125)) == 18
    seen = []
    whole = tester.test("no reduction", Policy(), model, lambda done, total: seen.append(done))
    assert seen[-1] == len(tester.questions) == len(whole.answers) == 16
    questions = [example.question.text for example in reference.make_examples(16, "test")]
    assert [example.question.text for example in tester.questions] == questions
