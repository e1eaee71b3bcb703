"""Searches whose data, budget or user is unusual: what is left of them is right, and reported."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import searches
import torch
from searches import labelled, small_model
from tiny import IMAGE
from transformers import LlavaForConditionalGeneration

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.estimate import Estimate
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.outcome import result_of
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.scoring import Scoring
from deos_fx.passes.search.search import search
from deos_fx.passes.search.space import relaxed
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_result import Candidate

SMALL = Budget(flops=0.6)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in searches.SHORT.items():
        monkeypatch.setattr(run_module, name, value)


def damaged(model: Any, *numbers: int) -> list[dict[str, Any]]:
    data = labelled(model)
    for number in numbers:
        data[number]["pixel_values"] = torch.full_like(data[number]["pixel_values"], math.nan)
    return data


# *** losses that are not numbers ***


def test_steps_that_nothing_comes_of_end_with_a_warning(model: Any) -> None:
    message = r"steps at projector end after 10 of .*the batches \[1\] of data"
    with pytest.warns(RuntimeWarning, match=message):
        found = search(model, damaged(model, 1), budget=SMALL, steps=120, sites=["projector"])
    # A search may go through several rounds of steps, and each of them ends early.
    assert len(found.history) % 10 == 0 and len(found.history) < 60
    assert all(not step["finite"] and step["not_finite"] == [1] for step in found.history)
    assert math.isfinite(found.best.loss)


def test_steps_that_costs_stop_end_with_a_warning(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AugmentedLagrangian, "penalty", lambda self, costs: math.nan * costs["flops"]
    )
    problem = SearchProblem.of(model, labelled(model), SMALL)
    # Counts are trained where several sites share the limits.
    sites = (Reduction("projector", 32), Reduction("decoder.0", 8))
    run = run_module.SearchRun(problem, 30, 0, None, None)
    message = r"decoder.0 end after 10 of 30: .*the costs under the limits .*flops"
    with pytest.warns(RuntimeWarning, match=message):
        descent = run.descend("steps", Policy(sites), 30)
    assert not any(step["finite"] or step["not_finite"] for step in descent.state.history)


def test_steps_go_on_beside_damaged_data(model: Any) -> None:
    # The first batch is the one that learned parts start from.
    message = r"moved nothing where gradients were NaN or infinite, in the batches \[0\] of data"
    with pytest.warns(RuntimeWarning, match=message):
        found = search(model, damaged(model, 0), budget=Budget(visual_tokens=4), steps=6)
    assert math.isfinite(found.best.loss)


def test_damaged_data_that_policies_are_scored_on_is_refused(model: Any) -> None:
    # Of four batches, the last one is held back.
    with pytest.raises(ValueError, match="NaN or infinite.*batches 3 to 3 of data"):
        search(model, damaged(model, 3), budget=SMALL, steps=2)


def test_a_loss_that_is_no_number_is_never_the_best(model: Any, tmp_path: Path) -> None:
    problem = SearchProblem.of(model, labelled(model), SMALL)
    assert problem.scored(lambda batch: torch.tensor(math.nan)) == math.inf
    assert problem.scored(lambda batch: torch.tensor(-math.inf)) == math.inf
    start = Policy((Reduction("projector", 8, scores={"feature_norm": 1.0}),))

    def state() -> SearchState:
        reductions = relaxed(start, problem.visual_tokens)
        return SearchState.start(reductions, AugmentedLagrangian(problem.limits), {})

    first = state()
    first.consider(math.inf)
    first.save(tmp_path)
    again = state()
    again.resume(tmp_path)
    # Parameters are kept, so that there is a policy, until others have a loss.
    assert again.best and again.best_loss == math.inf
    again.consider(2.0)
    again.consider(math.inf)
    assert again.best_loss == 2.0


def test_a_policy_without_a_loss_is_not_returned(model: Any) -> None:
    problem = SearchProblem.of(model, labelled(model), SMALL)
    step = Reduction("projector", 8, scores={"feature_norm": 1.0})
    policy = Policy((step,))
    cost = problem.cost.predict(policy)
    infinite = Candidate(policy, "preset", math.inf, cost)
    with pytest.raises(ValueError, match="loss of every policy that was tried, of 1, is NaN"):
        result_of(problem, [infinite], [], 0.0, False)
    found = result_of(problem, [infinite, Candidate(policy, "steps", 9.0, cost)], [], 0.0, False)
    assert found.best.source == "steps"


def test_a_policy_is_scored_once(model: Any) -> None:
    problem = SearchProblem.of(model, labelled(model), SMALL)
    scoring = Scoring(problem, Estimate(None), None)
    policy = Policy((Reduction("projector", 8, scores={"feature_norm": 1.0}),))
    scoring.add_all("presets", [("first", policy), ("second", policy)])
    assert [each.source for each in scoring.candidates] == ["first"]
    assert scoring.loss(policy) == scoring.best.loss == problem.static_loss(policy)


def test_a_loss_on_all_data_leaves_out_what_steps_leave_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = SearchProblem.of(model, labelled(model), SMALL)
    (held_back,), steps = problem.scoring, problem.training
    losses = {held_back.number: 5.0}
    losses |= {batch.number: loss for batch, loss in zip(steps, (1.0, math.nan, 3.0), strict=True)}

    def looked_up(problem: SearchProblem, policy: Policy) -> list[float]:
        return [losses[batch.number] for batch in problem.scoring]

    monkeypatch.setattr(SearchProblem, "static_losses", looked_up)
    monkeypatch.setattr(SearchProblem, "static_loss", lambda problem, policy: losses[3])
    scoring = Scoring(problem, Estimate(None), None)
    policy = Policy((Reduction("projector", 8, scores={"feature_norm": 1.0}),))
    # Three batches of the steps with a mean of 2, and the one that is held back.
    assert scoring.on_all_data(policy) == (3 * 2.0 + 5.0) / 4
    other = Policy((Reduction("projector", 9, scores={"feature_norm": 1.0}),))
    losses |= {batch.number: math.inf for batch in steps}
    assert scoring.on_all_data(other) == math.inf


# *** little data, few tokens, much budget ***


@pytest.mark.parametrize("empty", [{}, {"input_ids": torch.zeros(0, 70, dtype=torch.long)}])
def test_empty_batches_are_refused(model: Any, empty: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Batch 2 of data \(from 0\) is empty"):
        search(model, [*labelled(model)[:2], empty], budget=SMALL)


def test_one_visual_token_is_all_there_is() -> None:
    config = copy.deepcopy(small_model().config)
    config.vision_config.image_size = config.vision_config.patch_size
    config.image_seq_length = 1
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    ids = torch.tensor([[5, IMAGE, 7, 8], [6, IMAGE, 9, 4]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    found = search(model, [batch], budget=Budget(visual_tokens=1.0))
    assert found.policy.reductions == ()
    with pytest.raises(ValueError, match="even one visual token at every site is too much"):
        search(model, [batch], budget=Budget(visual_tokens=0.5))


def test_no_reduction_is_returned_where_it_is_best(model: Any, tmp_path: Path) -> None:
    # Without labels, nothing is closer to the unreduced model than itself.
    data = [{name: x for name, x in b.items() if name != "labels"} for b in labelled(model)]
    found = search(model, data, budget=Budget(visual_tokens=1.0), steps=2)
    assert found.best.source == "no reduction" and found.policy.reductions == ()
    assert found.best.loss == found.unreduced_loss == pytest.approx(0, abs=1e-6)
    # Its page needs no step and no reduction.
    found.report(tmp_path / "report.html")
    assert "no reduction" in (tmp_path / "report.html").read_text()


# *** Ctrl-C, and how long it takes ***

STAGES = (
    ("capture", 1),
    ("capture", 4),
    ("presets", 1),
    ("estimate", None),
    ("place 1 of 2", 1),
    ("place 2 of 2", 3),
    ("finalist 1 of 2", 1),
    ("steps", 1),
    ("variations", 1),
)


@pytest.mark.parametrize(("stage", "step"), STAGES)
def test_interruptions_leave_the_best_so_far(model: Any, stage: str, step: int | None) -> None:
    seen: list[str] = []

    def progress(now: str, done: int, total: int) -> None:
        seen.append(now)
        if now == stage and step in (None, done):
            raise KeyboardInterrupt

    sites = ["projector", "decoder.0"]
    settings: dict[str, Any] = {"budget": SMALL, "steps": 3, "sites": sites}
    found = search(model, labelled(model), progress=progress, **settings)
    assert found.interrupted
    assert found.basis.startswith("The search was interrupted, and this is the best")
    assert found.best.cost.flops <= found.limits["flops"]
    assert found.best.loss == min(each.loss for each in found.candidates)
    # Nothing that was seen before is lost, and nothing new is begun but what gives a policy.
    assert set(seen[seen.index(stage) + 1 :]) <= {stage, "presets"}
    tried = any(each.source.startswith("gradient at") for each in found.candidates)
    assert tried == any(now.startswith(("place", "finalist", "steps")) for now in seen) or (
        stage == "estimate"
    )


def test_while_the_model_answers_its_answers_so_far_are_used(model: Any) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("answers", 2):
            raise KeyboardInterrupt

    data = [{k: v for k, v in batch.items() if k != "labels"} for batch in labelled(model)]
    found = search(model, data, budget=SMALL, progress=progress)
    assert found.interrupted and found.history == []
    assert found.best.cost.flops <= found.limits["flops"]


def test_before_anything_is_captured_there_is_nothing_to_return(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deos_fx.passes.search.batches._with_target", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(model, labelled(model), budget=SMALL)


def test_before_the_first_step_a_preset_is_returned(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deos_fx.passes.search.run.site_tokens", interrupted)
    found = search(model, labelled(model), budget=SMALL)
    assert found.interrupted and found.history == []
    assert found.best.source.startswith("preset")


def test_a_result_is_not_lost_while_it_is_made(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def once(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result_of(*arguments)

    monkeypatch.setattr(run_module, "result_of", once)
    found = search(model, labelled(model), budget=SMALL, steps=1, sites=["projector"])
    assert found.interrupted and len(found.history) == 1


def test_the_time_is_estimated_once_from_the_first_step(model: Any) -> None:
    told: list[tuple[str, int, int]] = []
    estimate = Estimate(lambda *values: told.append(values))
    assert estimate.of_loss(lambda: 3.0) == 3.0
    estimate.loss, estimate.start = 0.5, estimate.start - 7
    estimate.tell(2.0, steps=10, losses=20)
    estimate.tell(9.0, steps=10, losses=20)
    # Seven seconds so far; then 10 steps of 2 seconds, and 20 losses of half a second.
    assert told == [("estimate", 7, 37)]
    seen: list[str] = []
    sites = ["projector"]
    show = lambda now, *_: seen.append(now)  # noqa: E731
    search(model, labelled(model), budget=SMALL, steps=2, sites=sites, progress=show)
    assert seen.count("estimate") == 1
    assert seen[seen.index("estimate") + 1].startswith("steps")
