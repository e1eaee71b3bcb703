"""A graph in two parts, before its decoder and from it on, against the whole."""

from __future__ import annotations

import copy
import operator

import pytest
import tiny
import torch
from families import prompts, shared

from deos_fx.models.upstream import CACHE
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.pipeline import copy_of, run_graph
from deos_fx.passes.rewrite.split_embeddings import (
    EMBEDDINGS,
    decoder_of,
    embeddings_of,
    goes_around,
)
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


@torch.no_grad()
def test_two_parts_of_a_step_are_the_whole() -> None:
    model = tiny.shared_llava(2)
    batch = tiny.inputs(model, 2)
    words = torch.tensor([[5], [6]])
    expected = model(input_ids=words, **{CACHE: model(**batch, use_cache=True)[CACHE]}).logits
    reduced = ReducedModel(model, Policy())
    cache = reduced(**batch, use_cache=True)[CACHE]
    # Finding the step runs it, which fills the cache.
    call = tiny.call_of(model, {"input_ids": words, CACHE: copy.deepcopy(cache)})
    step = reduced.graphs.step(call)
    hidden = run_graph(embeddings_of(step), call.inputs)[EMBEDDINGS]
    assert torch.equal(hidden, model.get_input_embeddings()(words))
    decoder = decoder_of(step)
    assert not decoder.graph.find_nodes(op="placeholder", target="input_ids")[0].users
    found = run_graph(decoder, {**call.inputs, EMBEDDINGS: hidden, CACHE: cache})["logits"]
    assert torch.equal(found, expected)


@torch.no_grad()
def test_hidden_states_of_a_reduced_prompt_are_those_that_its_first_layer_gets() -> None:
    model = tiny.shared_llava(2)
    reduced = ReducedModel(model, Policy((Reduction("projector", 9, gain=1),)))
    batch = tiny.inputs(model, 2)
    seen: list[torch.Tensor] = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    reduced(**batch)
    hook.remove()
    assert reduced.graph_module is not None
    call = tiny.call_of(model, batch)
    fields = run_graph(embeddings_of(reduced.graph_module), call.inputs)
    assert torch.equal(fields[EMBEDDINGS], seen[-1])
    assert fields["spaces"][0]["origin"].shape == seen[-1].shape[:2]


def test_layers_that_read_more_than_hidden_states_are_refused() -> None:
    model = tiny.shared_llava(2)
    call = tiny.call_of(model, tiny.inputs(model))
    graph_module = copy_of(ReducedModel(model, Policy()).graphs.prefill(call, call.layout))
    assert not goes_around(graph_module, ["pixel_values"])
    graph = graph_module.graph
    layer = blocks_of(graph, "decoder")[1]
    # As a family would whose layers also read the features of the image.
    (features,) = [node for node in graph.nodes if node.target == "multi_modal_projector"]
    with graph.inserting_before(layer):
        added = graph.call_function(operator.add, (layer.args[0], features))
    layer.replace_input_with(layer.args[0], added)
    assert goes_around(graph_module, ["pixel_values"])
    with pytest.raises(ValueError, match="the layers take more than hidden states"):
        decoder_of(graph_module)


def test_deepstack_goes_around_the_hidden_states_that_enter() -> None:
    call = tiny.call_of(shared("qwen3_vl", 3), prompts("qwen3_vl"))
    graph_module = ReducedModel(call.model, Policy()).graphs.prefill(call, call.layout)
    assert goes_around(graph_module, call.images)
