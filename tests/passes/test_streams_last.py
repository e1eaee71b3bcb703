"""Streams of hidden states that a model's code has in front of the batch."""

from __future__ import annotations

import torch
from closeness import assert_close
from handmade import BLOCKS, PROMPT, WIDTH, Handmade
from torch import fx

from deos_fx.passes.graph import blocks_of
from deos_fx.passes.notes import note_of, note_of_graph
from deos_fx.passes.rewrite.streams_last import streams_last


def stacked(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """Two streams in front: the hidden states, and twice as much."""
    return graph.call_function(
        torch.stack, ([value, graph.call_function(torch.add, (value,) * 2)],)
    )


def test_layers_take_and_give_streams_behind_the_tokens() -> None:
    model = Handmade(decoder_0=stacked)
    graph_module = model.module()
    logits = graph_module(**model.inputs)["logits"]
    after = streams_last(graph_module)
    layers = blocks_of(after.graph, "decoder")
    for node in layers.values():
        assert note_of(node).axes == 1
        assert tuple(note_of(node).shape) == (*PROMPT.shape, 2, WIDTH)
    # Views are at both ends, and not between layers.
    assert sum(node.target is torch.movedim for node in after.graph.nodes) == 2
    assert torch.equal(after(**model.inputs)["logits"], logits)
    # A layer that is found by its block does what the node does.
    hidden = torch.randn(*PROMPT.shape, 2, WIDTH)
    for block, layer in note_of_graph(after).blocks.items():
        if block.stage == "decoder":
            called = after.get_submodule(str(layers[block.index].target))
            assert torch.equal(layer(hidden), called(hidden))
            assert_close(layer(hidden), model.blocks[block](hidden))


def test_other_layers_are_left_as_they_are() -> None:
    graph_module = Handmade().module()
    code, blocks = graph_module.code, note_of_graph(graph_module).blocks
    assert streams_last(graph_module).code == code
    assert note_of_graph(graph_module).blocks == blocks and len(blocks) == 2 * BLOCKS
