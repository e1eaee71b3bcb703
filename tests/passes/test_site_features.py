"""Features of sites in a graph built by hand: what they emit, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import PATCHES, PROMPT, Handmade, getitem
from torch import fx

from deos_fx import tokens
from deos_fx.passes.finish import finish
from deos_fx.passes.observe.features import SiteFeatures
from deos_fx.passes.observe.site_features import PromptFeatures, PromptText, TowerFeatures

VISUAL = [[1, 2, 3, 4]]


def caller(graph: fx.Graph) -> Callable[..., fx.Node]:
    return lambda function, *arguments: graph.call_function(function, arguments)


def values(made: Handmade, graph_module: fx.GraphModule, **nodes: fx.Node) -> dict[str, Any]:
    """What nodes are in a run."""
    made.graph.output_node().args = (nodes,)
    with torch.no_grad():
        return finish(graph_module)(**made.inputs)


def test_a_feature_is_made_once_and_when_it_is_looked_up() -> None:
    made = Handmade()
    graph_module = made.module()
    block, asked = made.node("decoder_0"), list[str]()
    features = SiteFeatures(
        graph_module,
        "decoder.0",
        block,
        ["grid"],
        caller(made.graph),
        makers={"grid": lambda: asked.append("grid")},
    )
    assert (features.hidden, features.anchor, asked) == (block, block.next, [])
    assert features["grid"] is features["grid"]
    assert asked == ["grid"]
    with pytest.raises(ValueError, match="decoder.0 has no feature 'tea'"):
        features["tea"]


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ("tokens@next", "only attention and keys can be observed"),
        ("keys@decoder.2", "cannot observe 'decoder.2': it can observe 'next' and decoder.0 to"),
        ("keys@vision.0", "cannot observe 'vision.0'"),
        ("keys@decoder.0", "observes the attention of decoder.0, but decoder.0 is reduced in"),
    ],
)
def test_only_blocks_that_saw_the_same_tokens_are_observed(need: str, message: str) -> None:
    made = Handmade()
    graph_module = made.module()
    where = graph_module, "decoder.1", made.node("decoder_1"), [need], caller(made.graph)
    with pytest.raises(ValueError, match=message):
        SiteFeatures(*where, reduced=["decoder.0"])


def test_what_the_next_block_reads_is_brought_forward() -> None:
    made = Handmade()
    graph_module = made.module()
    block, following = made.node("decoder_0"), made.node("decoder_1")
    with made.graph.inserting_before(following):
        mask = made.graph.call_function(torch.eq, (made.node("input_ids"), 0))
        late = made.graph.call_function(torch.add, (block, 1))
    following.kwargs = {"mask": mask, "late": late}
    SiteFeatures(graph_module, "decoder.0", block, ["keys@next"], caller(made.graph))
    assert mask < block < late
    made.graph.lint()


def test_features_of_a_prompt() -> None:
    made = Handmade()
    graph_module = made.module()
    call, block = caller(made.graph), made.node("decoder_0")
    with made.graph.inserting_before(block):
        visual = call(tokens.visual_positions, made.node("input_ids"), 9, PATCHES)
    text = PromptText(call, made.embeddings, visual, before=block)
    names = ("text_tokens", "text_mask", "normed_tokens")
    features = PromptFeatures(
        graph_module,
        "decoder.0",
        block,
        names,
        call,
        visual=visual,
        padding=lambda: None,
        text=text,
    )
    with made.graph.inserting_before(features.anchor):
        nodes = {name: features[name] for name in names}
    seen = values(made, graph_module, hidden=block, **nodes)
    hidden = seen["hidden"]
    assert torch.equal(seen["text_tokens"], hidden[:, [0, 5, 6]])
    assert seen["text_mask"].tolist() == [[0, 1, 1]]
    # In this model, the head is all that follows the last layer.
    assert torch.equal(seen["normed_tokens"], made.modules["head"](hidden[:, VISUAL[0]]))


def test_features_of_images() -> None:
    made = Handmade(class_tokens=1)
    graph_module = made.module()
    call, block = caller(made.graph), made.node("vision_0")
    with made.graph.inserting_before(made.node("pixel_values").next):
        embeddings = made.graph.call_module("embedding", (made.node("input_ids"),))
        visual = call(tokens.visual_positions, made.node("input_ids"), 9, PATCHES)
    names = ("class_token", "text_tokens")
    features = TowerFeatures(
        graph_module,
        "vision.0",
        block,
        names,
        call,
        class_tokens=1,
        text=PromptText(call, embeddings, visual),
        images=2,
    )
    with made.graph.inserting_before(features.anchor):
        nodes = {name: features[name] for name in names}
    seen = values(made, graph_module, hidden=block, **nodes)
    assert torch.equal(seen["class_token"], getitem(seen["hidden"], (slice(None), slice(1))))
    text = made.modules["embedding"](PROMPT[:, [0, 5, 6]])
    assert torch.equal(seen["text_tokens"], text.expand(2, -1, -1))
