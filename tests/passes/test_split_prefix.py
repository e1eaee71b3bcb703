"""The part of a relaxed graph that is computed once: what it holds, and that nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from tiny import call_of, inputs, tiny_llava
from torch import Tensor

from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.pipeline import capture_call, run_graph
from deos_fx.passes.rewrite.mark_prompt import mark_prompt
from deos_fx.passes.rewrite.split_prefix import split_prefix
from deos_fx.policy.reduction import Reduction


@pytest.mark.parametrize(
    ("site", "tower", "layers"),
    [("vision.0", 1, 0), ("projector", 2, 0), ("decoder.0", 2, 1), ("decoder.2", 2, 3)],
)
def test_two_parts_give_what_the_whole_gives(site: str, tower: int, layers: int) -> None:
    model = tiny_llava(layers=4)
    call = call_of(model, inputs(model, batch=2) | {"use_cache": False})
    captured = capture_call(model, call.inputs)
    assert captured.sites is not None
    start = Reduction(site, 8, scores={"feature_norm": 1.0}, gain=0.5, mass_bias=0.5)
    reduction = RelaxedReduction(start, activation=0.9, retention=0.2, runners_up=4)
    graph = insert_relaxed(captured.graph_module, captured.sites, {site: reduction}, call.layout)
    front, rest = split_prefix(graph)
    # All blocks before the reduction are in the first part, and no other.
    assert len(blocks_of(front.graph, "vision")) == tower
    assert len(blocks_of(front.graph, "decoder")) == layers
    assert len(blocks_of(rest.graph, "vision")) == 2 - tower
    assert len(blocks_of(rest.graph, "decoder")) == 4 - layers
    between: dict[str, Any] = run_graph(front, call.inputs)
    found = run_graph(rest, call.inputs | between)["logits"]
    assert_close(found, run_graph(graph, call.inputs)["logits"])
    # Its gradients are those of the whole.
    for logits in (found, run_graph(graph, call.inputs)["logits"]):
        (slope,) = torch.autograd.grad(logits.square().mean(), reduction.gain)
        assert slope != 0
    # Neither masks nor anything else of the square of the length is stored.
    length = call.inputs["input_ids"].shape[1]
    stored = [value for value in between.values() if isinstance(value, Tensor)]
    assert stored and all(length not in value.shape[2:] for value in stored)


@pytest.mark.parametrize("score", ["last_text_attention", "text_attention", "text_relevance"])
def test_a_marked_prompt_hides_the_answer(score: str) -> None:
    model = tiny_llava(layers=3)
    batch = inputs(model, batch=2, padding=None) | {"use_cache": False}
    call = call_of(model, batch)
    captured = capture_call(model, call.inputs)
    assert captured.sites is not None
    mark_prompt(captured.graph_module)
    start = Reduction("decoder.1", 8, scores={score: 1.0})
    reduction = RelaxedReduction.from_reduction(start, 1 / 8)
    graph = insert_relaxed(
        captured.graph_module, captured.sites, {"decoder.1": reduction}, call.layout
    )
    # The last three tokens are the answer, once another one.
    prompt = torch.ones_like(call.inputs["input_ids"])
    prompt[:, -3:] = 0
    gates = []
    for answer in (3, 5):
        ids = call.inputs["input_ids"].clone()
        ids[:, -3:] = answer
        given = call.inputs | {"input_ids": ids, "prompt_mask": prompt}
        gates.append(run_graph(graph, given)["gates"][0])
    assert torch.equal(*gates)
