"""Blocks of a graph that are observed or get a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import call_of, inputs, shared_llava
from torch import Tensor, fx

from deos_fx.attention.mask import biased_mask
from deos_fx.attention.seam import ObservedBlock
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.passes.pipeline import capture_call, lower_call
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


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
    bias_block(graph_module, block, None)
    with pytest.raises(ValueError, match="Plain. takes no attention_mask"):
        bias_block(graph_module, block, bias)
