"""What precedes the first reduction is computed once for a batch, and changes no loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import inputs, tiny_llava
from torch import fx, nn
from transformers import LlavaForConditionalGeneration

from deos_fx.passes.pipeline import lower_call, run_graph
from deos_fx.passes.search.fronts import _identity
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

POLICIES = {
    "none": (),
    "projector": (Reduction("projector", 9, scores={"cls_attention": 1.0}, gain=1.0),),
    "tower": (Reduction("vision.0", 9, scores={"feature_norm": 1.0}, position="compact"),),
    "grid": (Reduction("projector", 16, selector="grid"),),
    "decoder": (Reduction("decoder.1", 9, scores={"last_text_attention": 1.0}),),
    "two": (
        Reduction("projector", 20, scores={"text_relevance": 1.0}),
        Reduction("decoder.1", 9, scores={"last_text_attention": 1.0}, mass_bias=1.0),
    ),
}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=4)


def problem_of(model: LlavaForConditionalGeneration) -> SearchProblem:
    data: list[dict[str, Any]] = []
    for seed in range(2):
        torch.manual_seed(seed)
        batch = inputs(model, batch=2)
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        data.append(batch | {"labels": torch.full_like(batch["input_ids"], -100)})
        data[-1]["labels"][:, -2:] = batch["input_ids"][:, -2:]
    return SearchProblem.of(model, data, Budget(visual_tokens=0.5))


def whole_loss(problem: SearchProblem, policy: Policy) -> float:
    """The loss of graphs that are run as a whole."""
    losses = []
    for batch in problem.scoring:
        graph = lower_call(batch.captured.copy(), policy, batch.layout)
        with torch.no_grad():
            fields = run_graph(graph, batch.inputs)
        origin = fields["spaces"][-1]["origin"] if fields.get("spaces") else None
        losses.append(float(batch.target.loss(fields["logits"], origin)))
    return sum(losses) / len(losses)


def test_losses_are_those_of_whole_graphs_in_any_order(model):
    problem = problem_of(model)
    for name in [*POLICIES, *reversed(POLICIES)]:
        policy = Policy(POLICIES[name])
        assert problem.static_loss(policy) == whole_loss(problem, policy), name


def test_policies_that_begin_alike_run_the_tower_once_for_each_batch(model):
    problem = problem_of(model)
    runs: list[int] = []
    tower = model.model.vision_tower.embeddings
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        for keep in (9, 10, 11):
            for selector in ("top_k", "greedy"):
                reduction = Reduction(
                    "projector", keep, scores={"cls_attention": 1.0}, selector=selector
                )
                problem.static_loss(Policy((reduction,)))
        assert len(runs) == len(problem.scoring)
        # Another observation is another beginning.
        problem.static_loss(Policy((Reduction("projector", 9, scores={"novelty": 1.0}),)))
        assert len(runs) == 2 * len(problem.scoring)
    finally:
        handle.remove()
    assert problem.effort.evaluations == 7 * len(problem.scoring)


def test_graphs_of_the_same_code_differ_by_their_modules():
    def graph_of(module: nn.Module) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.call_module("part", (graph.placeholder("x"),)))
        return fx.GraphModule({"part": module}, graph)

    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert _identity(graph_of(one)) == _identity(graph_of(one)) != _identity(graph_of(other))
