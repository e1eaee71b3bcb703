"""Layers of a later turn with images: which are wrapped, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import prompts, shared

from deos_fx.attention.continued import ContinuedLayer
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.pipeline import capture_call
from deos_fx.passes.rewrite.continue_text import continue_text, continues
from deos_fx.tokens.turn import TurnCache


def captured(name: str) -> Any:
    model = shared(name)
    return capture_call(model, completed(Call.of(facts_of(model), prompts(name))).inputs)


def test_decoder_layers_are_wrapped_and_the_model_is_left_alone() -> None:
    graph_module = captured("vipllava").copy().graph_module
    layers = blocks_of(graph_module.graph, "decoder")
    assert not any(continues(graph_module, node) for node in layers.values())
    continue_text(graph_module)
    assert all(continues(graph_module, node) for node in layers.values())
    assert not any(isinstance(part, ContinuedLayer) for part in shared("vipllava").modules())
    assert not any(
        continues(graph_module, node) for node in blocks_of(graph_module.graph, "vision").values()
    )


def test_layers_with_a_state_are_left_as_they_are() -> None:
    graph_module = continue_text(captured("lfm2_vl").copy().graph_module)
    layers = blocks_of(graph_module.graph, "decoder")
    assert [i for i, node in layers.items() if not continues(graph_module, node)] == [0, 1, 3]


def test_an_index_that_makes_its_own_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="does not attend by a mask and a cache alone"):
        continue_text(captured("glm5_next").copy().graph_module)


def test_without_earlier_turns_a_turn_is_a_prompt() -> None:
    graph_module = continue_text(captured("vipllava").copy().graph_module)
    model, batch = shared("vipllava"), prompts("vipllava")
    inputs = completed(Call.of(facts_of(model), batch)).inputs
    inputs[CACHE] = TurnCache(model.config.get_text_config())
    names = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
    logits = graph_module(**{name: inputs[name] for name in names})["logits"]
    assert torch.equal(logits, model(**batch).logits)
