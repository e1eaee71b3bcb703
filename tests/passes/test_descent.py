"""The gradient steps of a search: what they judge by, which batches they take, what they leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import inputs, tiny_llava

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.descent import Descent, site_tokens
from deos_fx.passes.search.fronts import Fronts
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import discretise
from deos_fx.passes.search.run import SearchRun
from deos_fx.passes.search.scoring import Scoring
from deos_fx.passes.search.space import relaxed, start_reduction
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


def problem_of(model: Any, batches: int = 8, prompts: int = 2) -> SearchProblem:
    data = []
    for i in range(batches):
        torch.manual_seed(i)
        batch = inputs(model, batch=prompts)
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
        data.append(batch)
    return SearchProblem.of(model, data, Budget(visual_tokens=0.25))


@pytest.fixture(scope="module")
def problem() -> SearchProblem:
    return problem_of(tiny_llava(layers=3))


def descent_of(problem: SearchProblem, names: list[str], steps: int = 4) -> Descent:
    sites = replace(problem, names=tuple(names)).searched_sites()
    tokens = site_tokens(problem, sites)
    counts = {1: (12,), 2: (24, 6)}[len(sites)]
    starts = [
        replace(start_reduction(site, tokens[site.name]), keep=count)
        for site, count in zip(sites, counts, strict=True)
    ]
    reductions = relaxed(Policy(tuple(starts)), problem.visual_tokens, runners_up=6)
    state = SearchState.start(reductions, AugmentedLagrangian(problem.limits), {})
    return Descent(problem, state, steps, seed=0)


@pytest.mark.parametrize("names", [["projector"], ["decoder.0"], ["projector", "decoder.1"]])
def test_what_is_judged_is_the_loss_of_what_is_deployed(
    problem: SearchProblem, names: list[str]
) -> None:
    descent = descent_of(problem, names)
    descent.run(lambda step: None)
    policy = discretise(descent.reductions, problem.visual_tokens)
    assert [reduction.site for reduction in policy.reductions] == names
    # Judged with as many tokens as the limits allow; those of decoder.0 alone cannot meet them.
    fitted = problem.fit(policy) or policy
    assert descent.judge() == pytest.approx(problem.static_loss(fitted), rel=1e-3)
    # The start was judged too, so the best is no worse than that.
    losses = [record["static"] for record in descent.state.history if "static" in record]
    assert descent.state.best_loss <= min(losses)
    descent.state.take_best()
    assert descent.judge() == pytest.approx(descent.state.best_loss, rel=1e-5)


def test_steps_train_the_reductions_and_nothing_else(problem: SearchProblem) -> None:
    weights = [parameter.clone() for parameter in problem.model.parameters()]
    descent = descent_of(problem, ["projector"])
    reduction = descent.reductions["projector"]
    before = {name: value.clone() for name, value in reduction.state_dict().items()}
    descent.run(lambda step: None)
    fixed = {
        name for name, value in reduction.state_dict().items() if torch.equal(value, before[name])
    }
    assert fixed == {"activation", "retention", "reweight"}
    assert all(map(torch.equal, weights, problem.model.parameters()))
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_counts_of_two_sites_are_trained(problem: SearchProblem) -> None:
    descent = descent_of(problem, ["projector", "decoder.1"])
    before = descent.reductions["decoder.1"].retention.item()
    descent.run(lambda step: None)
    assert descent.reductions["decoder.1"].retention.item() != before


def test_small_batches_are_averaged_and_every_epoch_takes_each_once(problem: SearchProblem) -> None:
    descent = descent_of(problem, ["projector"])
    # Six batches of two prompts: a step takes all of them, since 16 prompts would be eight.
    taken = descent._batches()
    assert len(problem.training) == 6 and {id(batch) for batch in taken} == {
        id(batch) for batch in problem.training
    }
    large = descent_of(problem_of(problem.model, 8, 16), ["projector"])
    order = []
    for _ in range(6):
        (batch,) = large._batches()
        order.append(id(batch))
        large.state.history.append({})
    assert len(set(order)) == 6


def test_what_comes_before_a_reduction_runs_once_for_all_that_begin_alike() -> None:
    model = tiny_llava(layers=2)
    problem = problem_of(model, batches=2)
    runs: list[int] = []
    layer = model.model.vision_tower.encoder.layers[0]
    layer.register_forward_pre_hook(lambda *_: runs.append(0))
    for gain in (0.0, 1.0):
        problem.static_loss(Policy((Reduction("projector", 8, gain=gain),)))
    assert len(runs) == len(problem.scoring)
    # Another observation is another beginning.
    problem.static_loss(Policy((Reduction("projector", 8, scores={"mutual_attention": 1.0}),)))
    assert len(runs) == 2 * len(problem.scoring)


def test_values_that_were_not_used_for_long_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deos_fx.passes.search.fronts._MOST_BYTES", 0)
    problem = problem_of(tiny_llava(layers=2), batches=2)
    policy = Policy((Reduction("projector", 8),))
    assert problem.static_loss(policy) == problem.static_loss(policy)
    assert isinstance(problem.fronts, Fronts) and len(problem.fronts._known) == 1


def test_what_a_search_takes_is_planned_before_its_first_step(problem: SearchProblem) -> None:
    run = SearchRun(problem, 60, 0, None, None)
    # The steps, half as many in another regime, and what is measured: both, regimes, variations.
    steps, losses = 60 + 30, 2 * 9 + 7 + 40
    assert run._planned(1, 8) == (steps, losses)
    # Three places and two on each side of the best, and four finalists.
    assert run._planned(3, 8) == (steps + 7 * 24 + 4 * 20, losses + 11 * 9 + 4 * 3)
    # Two tighter budgets go on from this one, with half of the steps and of the variations.
    run.further = 2
    assert run._planned(1, 8) == (steps + 2 * 30, losses + 2 * (9 + 20 + 5))


def test_places_that_lose_on_all_data_are_no_candidates(
    problem: SearchProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_TRIAL", 2)
    # As if every single site were better than every pair.
    monkeypatch.setattr(Scoring, "on_all_data", lambda scoring, policy: len(policy.reductions))
    run = SearchRun(problem, 6, 0, None, None)
    run.advance(("steps",))
    assert any(len(descent.reductions) == 2 for descent in run.descents)
    assert run.scoring.candidates
    for candidate in run.scoring.candidates:
        (reduction,) = candidate.policy.reductions
        assert candidate.source == f"gradient at {reduction.site}"


@pytest.mark.parametrize(
    ("static", "gates", "share"), [(0.4, "hard", 1.0), (0.6, "soft", 1.0), (2.0, "soft", 0.5)]
)
def test_gates_close_where_they_leak_and_harden_where_they_blur(
    problem: SearchProblem, static: float, gates: str, share: float
) -> None:
    """Against the loss of the steps before, which is 1."""
    descent = descent_of(problem, ["projector"], steps=100)
    descent.step()
    temperature = descent.reductions["projector"].gate_temperature
    descent.state.history[-1].update(task=1.0, static=static)
    descent.step()
    (reduction,) = descent.reductions.values()
    assert reduction.gates == gates
    assert reduction.gate_temperature == pytest.approx(share * temperature, rel=0.01)
    # A search that goes on from a checkpoint has the same.
    resumed = descent_of(problem, ["projector"], steps=100)
    resumed.state.history = [*descent.state.history]
    resumed.step()
    descent.step()
    (other,) = resumed.reductions.values()
    assert (other.gates, other.gate_temperature) == (reduction.gates, reduction.gate_temperature)
