"""The embeddings of the text stand before the features of images, whatever a model reads first."""

from __future__ import annotations

import operator

import torch
from families import prompts, shared
from torch import fx, nn

from deos_fx import Policy, ReducedModel, Reduction
from deos_fx.passes.analyse.sites import Encoder, Sites
from deos_fx.passes.rewrite.read_text_first import read_text_first

SITES = Sites((), "features", "embeddings", Encoder.MIXING, "features")


def graph_of(*order: str) -> fx.GraphModule:
    """Pixels and ids that are added in the end, made in this order."""
    graph = fx.Graph()
    made = {name: graph.placeholder(name) for name in ("pixels", "ids")}
    sources = {"features": "pixels", "cast": "ids", "embeddings": "cast"}
    for name in order:
        made[name] = graph.create_node(
            "call_function", torch.neg, (made[sources[name]],), name=name
        )
    graph.output(graph.call_function(operator.add, (made["features"], made["embeddings"])))
    return fx.GraphModule(nn.Module(), graph)


def test_text_is_moved_in_its_order() -> None:
    late = graph_of("features", "cast", "embeddings")
    pixels, ids = torch.randn(2, 3).unbind(0)
    before = late(pixels, ids)
    names = [node.name for node in read_text_first(late, SITES).graph.nodes]
    assert names == ["pixels", "ids", "cast", "embeddings", "features", "add", "output"]
    assert torch.equal(late(pixels, ids), before)


def test_text_that_comes_first_stays() -> None:
    early = graph_of("cast", "embeddings", "features")
    code = early.code
    assert read_text_first(early, SITES).code == code


def test_queries_are_ranked_by_the_text() -> None:
    step = Reduction("projector", 0.5, scores={"text_relevance": 1.0})
    reduced = ReducedModel(shared("blip-2"), Policy((step,)))
    assert reduced(**prompts("blip-2", 2)).logits.shape[1] == 44 - 16
