"""Blocks of a graph that are observed or get a bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from closeness import assert_close
from families import prompts, shared
from masked import layers_of
from tiny import call_of, inputs, shared_llava
from torch import Tensor, fx
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from deos_fx.attention.mask import biased_mask
from deos_fx.attention.observation import Observation
from deos_fx.attention.seam import ObservedBlock
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE
from deos_fx.passes.finish import finish
from deos_fx.passes.observe.observe_block import bias_block, observe_attention, peek_block
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


def test_blocks_of_one_space_share_a_biased_mask() -> None:
    """Merging twice: each space has one mask with its own bias, and none of the one before."""
    model = shared_llava(4)
    call = call_of(model, {**inputs(model, 2), "use_cache": False})
    merge: dict[str, Any] = {"gain": 1.0, "mass_bias": 1.0, "scores": {"feature_norm": 1.0}}
    policy = Policy((Reduction("vision.0", 48, **merge), Reduction("decoder.1", 16, **merge)))
    captured = capture_call(model, call.inputs)
    graph_module = lower_call(captured, policy, call.layout)
    masks = [node for node in graph_module.graph.nodes if node.target is biased_mask]
    assert [[user.name for user in mask.users] for mask in masks] == [
        ["vision_1"],
        ["decoder_2", "decoder_3"],
    ]
    assert not any(source.target is biased_mask for source in masks[1].all_input_nodes)
    assert not [m for m in graph_module.modules() if isinstance(m, ObservedBlock)]


def test_only_blocks_with_a_mask_can_be_biased() -> None:
    class Plain(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    graph = fx.Graph()
    hidden, bias = graph.placeholder("hidden"), graph.placeholder("bias")
    block = graph.call_module("block", (hidden,))
    graph.output(block)
    graph_module = fx.GraphModule({"block": Plain()}, graph)
    bias_block(graph_module, block, None, block.args[0])
    with pytest.raises(ValueError, match="Plain. takes no attention_mask"):
        bias_block(graph_module, block, bias, block.args[0])


def layer_graph() -> tuple[fx.GraphModule, fx.Node, dict[str, Any]]:
    """One layer of transformers as a node, its graph, and the arguments of the graph."""
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, intermediate_size=8)
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0).eval()
    hidden = torch.randn(2, 5, 16)
    tables = LlamaRotaryEmbedding(config)(hidden, torch.arange(5)[None])
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    given = {"hidden": hidden, "attention_mask": mask, "position_embeddings": tables}
    graph = fx.Graph()
    first, *others = map(graph.placeholder, given)
    kwargs = {node.target: node for node in others}
    block = graph.create_node("call_module", "block", (first,), kwargs, "block")
    graph.output(graph.call_function(torch.neg, (block,)))
    return fx.GraphModule({"block": layer}, graph), block, given


def test_an_observed_block_also_returns_its_attention() -> None:
    graph_module, block, given = layer_graph()
    layer, before = graph_module.block, graph_module(**given)
    attention = layer.self_attn
    normed = layer.input_layernorm(given["hidden"])
    _, weights = attention(normed, given["position_embeddings"], given["attention_mask"])
    graph = graph_module.graph
    with graph.inserting_before(block):
        asked = graph.call_function(torch.full, ((2, 1), 3))
    wanted = [(Observation(), (asked, None, None)), (Observation("keys"), None)]
    seen, hidden, anchor = observe_attention(graph_module, block, wanted)
    assert anchor is graph.find_nodes(op="call_function", target=torch.neg)[0]
    assert anchor.args == (hidden,), "users read the hidden states alone"
    graph.output_node().args = ((anchor, *seen),)
    after, received, keys = finish(graph_module)(**given)
    assert torch.equal(after, before)
    assert_close(received, weights.mean(dim=1)[:, 3])
    key = attention.k_proj(normed).unflatten(-1, (4, -1)).transpose(1, 2)
    _, key = apply_rotary_pos_emb(key, key, *given["position_embeddings"])
    assert_close(keys, key.mean(dim=1))
    assert graph_module.block.original() is layer, "the model's own block stays as it is"


def test_a_peek_sees_what_the_block_would_see() -> None:
    graph_module, block, given = layer_graph()
    layer, graph = graph_module.block, graph_module.graph
    given["position_embeddings"] = tuple(table[:, :4] for table in given["position_embeddings"])
    given["attention_mask"] = given["attention_mask"][..., :4, :4]
    with graph.inserting_before(block):
        fewer = graph.call_function(torch.narrow, (block.args[0], 1, 1, 4))
        every = (None, None, None)
        seen = peek_block(graph_module, layer, "peek", block, fewer, [(Observation(), every)])
    graph.output_node().args = (seen[0],)
    received = finish(graph_module)(**given)
    normed = layer.input_layernorm(given["hidden"][:, 1:])
    _, weights = layer.self_attn(normed, given["position_embeddings"], given["attention_mask"])
    assert_close(received, weights.mean(dim=(1, 2)))


def test_a_bias_is_added_to_the_mask_and_taken_out_again() -> None:
    graph_module, block, given = layer_graph()
    before = graph_module(**given)
    graph = graph_module.graph
    with graph.inserting_before(graph.find_nodes(op="placeholder")[0]):
        bias = graph.placeholder("bias")
    bias_block(graph_module, block, bias, block.args[0])
    graph_module.recompile()
    (biased,) = graph.find_nodes(op="call_function", target=biased_mask)
    assert block.kwargs["attention_mask"] is biased
    key_bias = torch.randn(2, 5)
    mask = given["attention_mask"] + key_bias[:, None, None]
    tables = given["position_embeddings"]
    expected = -graph_module.block(given["hidden"], mask, position_embeddings=tables)
    assert_close(graph_module(key_bias, **given), expected)
    bias_block(graph_module, block, None, block.args[0])
    assert torch.equal(finish(graph_module)(key_bias, **given), before)
    assert not graph.find_nodes(op="call_function", target=biased_mask)


def test_a_peek_sees_the_bias_of_its_space_where_no_layer_before_has_the_same_mask() -> None:
    """Layers with a window and without one have masks of their own."""
    model, given = copy.deepcopy(shared("gemma3")), prompts("gemma3", 2)
    model.set_attn_implementation("eager")
    first = Reduction("decoder.0", 40, scores={"feature_norm": 1.0}, gain=1.0, mass_bias=1.0)
    weights: list[Tensor] = []
    # The first layer with a window after the first cut.
    attention = layers_of(model)[2].self_attn
    handle = attention.register_forward_hook(lambda *call: weights.append(call[2][1]))
    left = ReducedModel(model, Policy((first,)))(**given)[CACHE].spaces[-1].origin
    handle.remove()
    second = Reduction("decoder.1", 9, observe="next")
    policy = Policy((first, second))
    found = ReducedModel(model, policy)(**given)[CACHE].spaces[-1].origin
    for row in range(2):
        received = weights[-1][row, :, -1].mean(dim=0)
        visual = given["input_ids"][row, left[row]] == facts_of(model).image_token
        best = received.masked_fill(~visual, -1).topk(9).indices
        expected = left[row][~visual | torch.zeros_like(visual).index_fill(0, best, True)]
        assert found[row].tolist() == expected.tolist()
