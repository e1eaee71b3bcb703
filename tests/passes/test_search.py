"""The search: limits are met, interruptions lose nothing, resuming changes nothing."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import prompts, shared
from tiny import IMAGE, VISUAL, abacus, inputs, tiny_llava
from torch.utils._pytree import tree_flatten
from transformers import LlavaForConditionalGeneration

from deos_fx import transform
from deos_fx.cost.model import CostModel
from deos_fx.passes.pipeline import lower_call, run_graph
from deos_fx.passes.search import outcome as outcome_module
from deos_fx.passes.search import problem as problem_module
from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.places import factors, widened
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.search import search
from deos_fx.passes.search.timing import prefill
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.results.search_result import SearchResult
from deos_fx.runtime.reduced_model import ReducedModel

STEPS = 6
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=4)


def batches(model: LlavaForConditionalGeneration, *, labels: bool) -> list[dict[str, Any]]:
    """Four batches that differ in their tokens and images."""
    data = []
    for i in range(4):
        torch.manual_seed(i)
        batch = inputs(model, batch=2)
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        if labels:
            batch["labels"] = torch.full_like(batch["input_ids"], -100)
            batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
        data.append(batch)
    return data


def interrupt_at(step: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "steps" and done == step:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def few_variations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_TRIAL", 1)
    monkeypatch.setattr(run_module, "_VARIATIONS", 1)


@pytest.fixture(scope="module")
def stages() -> dict[str, int]:
    """What the search below goes through, and how far."""
    return {}


@pytest.fixture(scope="module")
def result(model: LlavaForConditionalGeneration, stages: dict[str, int]) -> SearchResult:
    return search(
        model,
        batches(model, labels=True),
        budget=Budget(visual_tokens=0.3, flops=0.8),
        steps=STEPS,
        progress=lambda stage, done, total: stages.update({stage: total}),
    )


def test_policy_meets_every_limit(result: SearchResult) -> None:
    for candidate in result.candidates:
        assert candidate.cost.visual_tokens <= result.limits["visual_tokens"]
        assert candidate.cost.flops <= result.limits["flops"]
    assert result.limits["visual_tokens"] == pytest.approx(0.3 * 64)


def test_returns_the_best_candidate_and_presets_are_among_them(result: SearchResult) -> None:
    losses = [candidate.loss for candidate in result.candidates]
    assert losses == sorted(losses)
    assert result.best.policy == result.policy
    sources = {candidate.source for candidate in result.candidates}
    assert "preset merge" in sources
    assert any(source.startswith("gradient at ") for source in sources)


def test_history_has_every_step_and_the_costs_stay_near_their_limits(result: SearchResult) -> None:
    assert [record["step"] for record in result.history] == list(range(1, STEPS + 1))
    tokens = [record["visual_tokens"] for record in result.history]
    # Steps may begin with more tokens.
    assert tokens[-1] < 1.1 * result.limits["visual_tokens"]


def test_it_goes_as_recorded(result: SearchResult, stages: dict[str, int]) -> None:
    """Up to the variations, many of which are equally good.

    After a change that is meant, write the record again with UPDATE_GOLDENS=1.
    """
    found = {
        # How many steps the estimate is for, but not how many seconds.
        "stages": {stage: total for stage, total in stages.items() if stage != "estimate"},
        "history": result.history,
        "limits": result.limits,
        "losses": [
            [candidate.source, candidate.loss]
            for candidate in result.candidates
            if not candidate.source.startswith("refined")
        ],
    }
    record = GOLDENS / "search.json"
    if os.environ.get("UPDATE_GOLDENS"):
        record.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(record.read_text())
    leaves, structure = tree_flatten(found)
    expected_leaves, expected_structure = tree_flatten(expected)
    assert structure == expected_structure
    # Steps add roundings up; a hundredth of another learning rate would be seen.
    assert leaves == [
        pytest.approx(leaf, rel=1e-4) if isinstance(leaf, float) else leaf
        for leaf in expected_leaves
    ]


def test_model_collects_no_gradients(
    model: LlavaForConditionalGeneration, result: SearchResult
) -> None:
    assert result.history
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("few_variations")
def test_self_distillation_of_the_unreduced_model_is_zero(
    model: LlavaForConditionalGeneration,
) -> None:
    data = batches(model, labels=False)
    found = search(model, data, budget=Budget(kv_cache=0.6), steps=2)
    assert found.unreduced_loss == pytest.approx(0, abs=1e-6)
    assert found.best.loss > 0
    assert found.best.cost.kv_bytes <= found.limits["kv_cache"]


@pytest.mark.usefixtures("few_variations")
def test_interruption_keeps_the_best_so_far(model: LlavaForConditionalGeneration) -> None:
    data = batches(model, labels=True)
    budget = Budget(visual_tokens=0.25)
    found = search(model, data, budget=budget, steps=STEPS, progress=interrupt_at(2))
    assert found.interrupted
    assert len(found.history) == 2
    assert found.best.cost.visual_tokens <= found.limits["visual_tokens"]


@pytest.mark.usefixtures("few_variations")
def test_resumed_search_is_bit_identical(
    model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    data = batches(model, labels=True)
    budget = Budget(visual_tokens=0.25)
    settings: dict[str, Any] = {"budget": budget, "steps": STEPS, "sites": ["projector"]}
    whole = search(model, data, **settings)
    search(model, data, checkpoint=tmp_path, progress=interrupt_at(3), **settings)
    resumed = search(model, data, checkpoint=tmp_path, **settings)
    assert json.dumps(resumed.history) == json.dumps(whole.history)
    assert resumed.policy == whole.policy
    assert resumed.candidates == whole.candidates
    # What the result rests on: of the batches a quarter is held back, and presets were tried.
    evidence = whole.evidence
    assert evidence is not None and evidence == resumed.evidence
    prompts = [len(batch["input_ids"]) for batch in data]
    held_back = len(data) // 4
    assert evidence.trained == sum(prompts[: len(data) - held_back])
    assert evidence.held_back == bool(held_back) and evidence.answers
    assert whole.best.source in whole.basis and str(evidence) in whole.basis
    if evidence.preset:
        lead = evidence.preset_loss - whole.best.loss
        assert evidence.lead == pytest.approx(lead, rel=1e-6)


@pytest.mark.usefixtures("few_variations")
def test_checkpoint_of_another_search_is_refused(
    model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    data = batches(model, labels=True)
    settings: dict[str, Any] = {"steps": 1, "checkpoint": tmp_path, "sites": ["projector"]}
    search(model, data, budget=Budget(visual_tokens=0.25), **settings)
    with pytest.raises(ValueError, match="another search"):
        search(model, data, budget=Budget(visual_tokens=0.5), **settings)


@pytest.mark.usefixtures("few_variations")
def test_latency_limit_is_measured(model: LlavaForConditionalGeneration) -> None:
    data = batches(model, labels=True)[:1]
    found = search(model, data, budget=Budget(visual_tokens=0.5, latency_ms=60_000), steps=1)
    assert found.history[0]["latency_ms"] > 0
    with pytest.raises(ValueError, match=r"No policy .* limits"):
        search(model, data, budget=Budget(latency_ms=1e-6), steps=1)


@pytest.mark.usefixtures("few_variations")
def test_latency_of_another_machine_is_predicted(
    model: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("this machine is measured")

    for module in (problem_module, outcome_module):
        for clock in {"in_turns", "milliseconds"} & {*vars(module)}:
            monkeypatch.setattr(module, clock, refuse)
    data = batches(model, labels=True)[:1]
    limit = 30.0 * model.config.text_config.num_hidden_layers
    budget = Budget(latency_ms=limit, latency_table=abacus(model))
    found = search(model, data, budget=budget, steps=1)
    text = data[0]["input_ids"].shape[1] - VISUAL
    kept = CostModel.of_images(model, images=1, text_tokens=text).counts(found.policy)
    assert sum(text + count for count in kept) <= limit
    assert max(entry["latency_ms"] for entry in found.history) > 0


def test_bad_data_is_refused(model: LlavaForConditionalGeneration) -> None:
    budget = Budget(visual_tokens=0.5)
    with pytest.raises(ValueError, match="data is empty"):
        search(model, [], budget=budget)
    with pytest.raises(TypeError, match="dicts of model inputs"):
        search(model, ["an image"], budget=budget)  # type: ignore[list-item]
    uneven = batches(model, labels=True)[:2]
    uneven[1]["pixel_values"] = torch.nn.functional.pad(uneven[1]["pixel_values"], (0, 8))
    with pytest.raises(ValueError, match="vary in size"):
        search(model, uneven, budget=budget)
    unlabelled = batches(model, labels=True)[:1]
    unlabelled[0]["labels"][:] = -100
    with pytest.raises(ValueError, match="-100 everywhere"):
        search(model, unlabelled, budget=budget)


def test_bad_budget_is_refused(model: LlavaForConditionalGeneration) -> None:
    data = batches(model, labels=True)[:1]
    with pytest.raises(ValueError, match="no limit"):
        search(model, data, budget=Budget())
    with pytest.raises(TypeError, match="Budget"):
        search(model, data, budget=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps is 0"):
        search(model, data, budget=Budget(flops=0.5), steps=0)
    with pytest.raises(ValueError, match="No policy meets the limits"):
        search(model, data, budget=Budget(flops=1000), steps=1)


@pytest.mark.usefixtures("few_variations")
def test_sites_in_the_tower_are_searched_if_asked_for(
    model: LlavaForConditionalGeneration,
) -> None:
    data = batches(model, labels=True)
    sites = ("decoder.1", "vision.0", "vision.1")
    found = search(model, data, budget=Budget(flops=0.6), steps=2, sites=sites)
    assert all(candidate.cost.flops <= found.limits["flops"] for candidate in found.candidates)
    rounded = [each.policy for each in found.candidates if each.source.startswith("gradient ")]
    assert {step.site for policy in rounded for step in policy.reductions} & {
        "vision.0",
        "vision.1",
    }
    # Presets and variations have no other sites either.
    everywhere = [step.site for each in found.candidates for step in each.policy.reductions]
    assert set(everywhere) <= set(sites)
    with pytest.raises(ValueError, match="sites is empty"):
        search(model, data, budget=Budget(flops=0.6), sites=[])
    with pytest.raises(ValueError, match="No policy at decoder.1 meets the limits .* other sites"):
        search(model, data, budget=Budget(visual_tokens=2), sites=["decoder.1"])
    with pytest.raises(TypeError, match="give a list of names"):
        search(model, data, budget=Budget(flops=0.6), sites="decoder.1")
    with pytest.raises(ValueError, match="vision.2 cannot be reduced: its output is not used"):
        search(model, data, budget=Budget(flops=0.6), sites=["vision.2"])


@pytest.mark.usefixtures("few_variations")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "gemma3", "internvl"])
def test_families(name: str) -> None:
    model, batch = shared(name), prompts(name, 2)
    found = search(model, [batch], budget=Budget(visual_tokens=0.3, flops=0.8), steps=1)
    sources = {candidate.source for candidate in found.candidates}
    assert {"preset fastv", "preset merge"} <= sources
    assert any(source.startswith("gradient at ") for source in sources)
    report = transform(model, policy=found.policy).cost(**batch)
    assert report.after.visual_tokens <= 0.3 * report.before.visual_tokens
    assert report.after.flops <= 0.8 * report.before.flops
    shares = name in ("qwen2_5_vl", "smolvlm")
    assert all(isinstance(step.keep, float) == shares for step in found.policy.reductions)


@pytest.mark.usefixtures("few_variations")
class Branching(LlavaForConditionalGeneration):
    """Does something else with a prompt that is alone."""

    @functools.wraps(LlavaForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if len(kwargs["input_ids"]) == 1:
            output.logits = output.logits * 2
        return output


def test_labels_spare_runs_of_the_unreduced_model() -> None:
    model = tiny_llava(layers=2)
    data, runs = batches(model, labels=True), list[int]()
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: runs.append(0))
    counts = []
    for number in (1, 1, 3):
        runs.clear()
        SearchProblem.of(model, data[:number], Budget(visual_tokens=0.3))
        counts.append(len(runs))
    assert counts[1] == counts[2]


@pytest.mark.parametrize("labels", [True, False])
def test_a_smaller_last_batch_may_take_another_branch(labels: bool) -> None:
    model = tiny_llava(layers=2)
    model.__class__ = Branching
    data = batches(model, labels=labels)[:2]
    data.append({name: value[:1] for name, value in data[0].items()})
    # Prompts of one length need no mask, and then have none. These are longer than the others.
    same = inputs(model, batch=2, text=9, padding=None)
    if labels:
        same["labels"] = same["input_ids"].masked_fill(same["input_ids"] == IMAGE, -100)
    data.append(same)
    problem = SearchProblem.of(model, data, Budget(visual_tokens=0.3))
    assert len({batch.kind for batch in problem.training + problem.scoring}) == 3
    # Scores that read no text: a search hides the answers, a call does not.
    norm: dict[str, Any] = {"scores": {"feature_norm": 1.0}}
    policy = Policy((Reduction("projector", 16), Reduction("decoder.0", 8, **norm)))
    reduced = ReducedModel(model, policy)
    for batch, given in zip(problem.training + problem.scoring, data, strict=True):
        graph = lower_call(batch.captured.copy(), policy, batch.layout)
        # Without labels, the model's own answers are behind the prompts.
        prompts = {name: batch.call.inputs[name] for name in given if name != "labels"}
        assert_close(run_graph(graph, batch.inputs)["logits"], reduced(**prompts).logits)
    # One prompt is measured, of the batch whose prompts are the longest.
    timed = []
    serving = SimpleNamespace(
        serving=lambda call: timed.append(call) or problem.captures.serving(call)
    )
    every = problem.training + problem.scoring
    prefill(serving, every, policy)()
    longest = max(batch.call.inputs["input_ids"].shape[1] for batch in every)
    # No reduction looks at padding.
    masks = [(batch.prompt, batch.call.inputs.get("attention_mask")) for batch in every]
    padded = [(prompt, mask == 0) for prompt, mask in masks if mask is not None]
    assert any(where.any() for _, where in padded)
    assert not any(prompt[where].any() for prompt, where in padded)
    assert timed[0].inputs["input_ids"].shape == (1, longest)


def test_batches_of_all_kinds_take_their_steps() -> None:
    model = tiny_llava(layers=2)
    model.__class__ = Branching
    data = [inputs(model, batch=2), inputs(model, batch=1), inputs(model, batch=2, padding=None)]
    found = search(model, data, budget=Budget(visual_tokens=0.3), steps=3, sites=["projector"])
    assert found.best.cost.visual_tokens <= found.limits["visual_tokens"]


def test_batches_with_and_without_labels_are_refused(model: LlavaForConditionalGeneration) -> None:
    data = [batches(model, labels=True)[0], batches(model, labels=False)[0]]
    with pytest.raises(ValueError, match="labels in 1 of the 2 batches"):
        search(model, data, budget=Budget(visual_tokens=0.3))


def test_batches_with_images_of_other_sizes() -> None:
    model, large = shared("qwen2_5_vl"), prompts("qwen2_5_vl")
    # 8 x 8 patches, merged by twos: 16 visual tokens instead of 32.
    keep = torch.ones(large["input_ids"].shape[1], dtype=torch.bool)
    keep[5:21] = False
    small = {
        name: value[:, keep] if value.shape[-1] == len(keep) else value
        for name, value in large.items()
    }
    small["image_grid_thw"] = torch.tensor([[1, 8, 8]])
    small["pixel_values"] = large["pixel_values"][:64]
    budget = Budget(visual_tokens=0.3)
    found = search(model, [large, small], budget=budget, steps=1, sites=["projector"])
    for batch in (large, small):
        report = transform(model, policy=found.policy).cost(**batch)
        assert report.after.visual_tokens <= 0.3 * report.before.visual_tokens


def tiled(model: Any, tiles: int) -> dict[str, Any]:
    """Two prompts about an image of so many tiles, with an answer of two tokens."""
    image = model.config.image_token_id
    row = [1, *[image] * (64 * tiles), 7, 8, 9]
    ids = torch.tensor([row, [*row[:-1], 10]])
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    generator = torch.Generator().manual_seed(tiles)
    pixels = torch.randn(2 * tiles, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels}


@pytest.mark.parametrize("limit", [0.3, 40])
def test_batches_with_images_of_other_numbers_of_tiles(
    limit: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_VARIATIONS", 1)
    model = shared("internvl")
    data = [tiled(model, tiles) for tiles in (1, 3)]
    budget = Budget(visual_tokens=limit)
    found = search(model, data, budget=budget, steps=1, sites=["projector"])
    for batch in data:
        batch.pop("labels")
        report = transform(model, policy=found.policy).cost(**batch)
        most = limit if isinstance(limit, int) else limit * report.before.visual_tokens
        assert report.after.visual_tokens <= most


def test_prompts_with_images_of_several_sizes_are_refused() -> None:
    model = shared("qwen2_5_vl")
    image = model.config.image_token_id
    two = {
        "input_ids": torch.tensor([[1, *[image] * 16, 6, *[image] * 4, 7, 8]]),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 4]]),
        "pixel_values": torch.randn(80, prompts("qwen2_5_vl")["pixel_values"].shape[1]),
    }
    words = r"Batch 0 of data \(from 0\): the images of a prompt have 4 and 16 visual tokens"
    with pytest.raises(ValueError, match=words):
        search(model, [two], budget=Budget(visual_tokens=0.5))


def test_tight_limits_are_approached_from_looser_ones(
    model: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = SearchProblem.of(model, batches(model, labels=True), Budget(visual_tokens=4))
    start = Policy((Reduction("projector", 4, scores={"feature_norm": 1.0}),))
    # A loss that falls by as much with every token, from 11 with one of them down to 1.
    losses = {1: 11.0, 4: 9.0, 8: 7.0, 16: 5.0, 32: 2.0}

    def static_loss(_: SearchProblem, policy: Policy) -> float:
        return losses[policy.counts(64)[-1]] if policy.reductions else 1.0

    with monkeypatch.context() as patched:
        patched.setattr(SearchProblem, "static_loss", static_loss)
        # Half way is 6: four times as many tokens are enough.
        assert factors(problem, start, 10) == [4, 2, 1]
        losses[4] = 6.0
        assert factors(problem, start, 10) == [1]
        losses[4], losses[32] = 9.0, 9.0
        losses.update({8: 9.0, 16: 9.0})
        assert factors(problem, start, 10) == [8, 4, 2, 1]
        assert factors(problem, start, 2) == [2, 1]
    wide, policy = widened(problem, start, 4)
    assert policy.counts(64) == [16] and wide.limits == {"visual_tokens": 16.0}
    assert wide.meets(policy) and not problem.meets(policy)
    monkeypatch.setattr(run_module, "factors", lambda *_: [4, 1])
    run = run_module.SearchRun(problem, 10, 0, None, None)
    run.train([start], [])
    assert [descent.problem.limits["visual_tokens"] for descent in run.descents] == [16, 4]
    assert [descent.steps for descent in run.descents] == [5, 5]
    assert [entry["step"] for entry in run.history] == list(range(1, 11))
    # What was reached with more tokens is a candidate with as many as are allowed.
    assert all(problem.meets(found.policy) for found in run.scoring.candidates)
