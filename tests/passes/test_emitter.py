"""What an emitter makes of nodes, tensors and constants."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from handmade import IMAGE, Handmade

from deos_fx import tokens
from deos_fx.passes.lower.emitter import Emitter
from deos_fx.passes.notes import note_of, note_of_graph


@pytest.fixture
def made() -> Handmade:
    return Handmade()


def test_nodes_are_named_after_function_and_site(made: Handmade) -> None:
    graph_module = made.module()
    emitter = Emitter(graph_module)
    with graph_module.graph.inserting_before(made.node("head")):
        assert emitter.call(torch.neg, made.merged).name == "neg"
        emitter.site = "decoder.1"
        assert emitter.call(torch.neg, made.merged).name == "neg_decoder1"


def test_constants_are_computed_at_once_and_stored_where_they_meet_a_node(made: Handmade) -> None:
    graph_module = made.module()
    emitter = Emitter(graph_module)
    emitter.site = "projector"
    two = emitter.call(torch.add, torch.ones(1), 1)
    assert torch.equal(two, torch.tensor([2.0]))
    head = made.node("head")
    with graph_module.graph.inserting_before(head):
        head.args = (emitter.call(torch.mul, made.node("decoder_1"), two),)
    graph_module.recompile()
    assert [name for name, _ in graph_module.named_buffers()] == ["constant_projector_0"]
    logits = graph_module(**made.inputs)["logits"]
    assert_close(logits, made.modules["head"](2 * hidden_of(made)))


def hidden_of(made: Handmade) -> torch.Tensor:
    """Hidden states after the last layer, computed without the graph."""
    ids, features = made.inputs["input_ids"], made.inputs["pixel_values"]
    for name in ("vision_0", "vision_1", "projector"):
        features = made.modules[name](features)
    hidden = made.modules["embedding"](ids)
    hidden[ids == IMAGE] = features[0]
    return made.modules["decoder_1"](made.modules["decoder_0"](hidden))


def test_arguments_move_to_the_device_of_the_tokens(made: Handmade) -> None:
    graph_module = made.module()
    emitter = Emitter(graph_module)
    visual = made.node("decoder_0")
    with graph_module.graph.inserting_before(made.node("head")):
        total = emitter.call_beside(visual, torch.add, made.merged, torch.ones(1))
    merged, ones = total.args
    assert merged.target is ones.target is tokens.beside
    assert merged.args == (made.merged, visual)
    assert ones.args[1] is visual
    assert torch.equal(getattr(graph_module, ones.args[0].target), torch.ones(1))


def test_values_are_marked_for_explanations(made: Handmade) -> None:
    graph_module = made.module()
    emitter = Emitter(graph_module)
    emitter.site = "decoder.0"
    emitter.explain("kept", made.merged)
    emitter.explain("score", torch.ones(2))
    emitter.explain("mass", None)
    assert note_of(made.merged).explains == (("decoder.0", "kept"),)
    assert list(note_of_graph(graph_module).explains) == [("decoder.0", "score")]
