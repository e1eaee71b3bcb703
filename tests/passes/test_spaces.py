"""Token spaces on small graphs: what is read after a cut, in prefill and in decoding."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from handmade import LAYOUT, PATCHES, PROMPT, Handmade
from torch import Tensor, fx, nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import ModelOutput

from deos_fx import tokens
from deos_fx.models.blocks import Block
from deos_fx.models.upstream import CACHE
from deos_fx.passes.analyse.annotate_token_spaces import annotate_token_spaces
from deos_fx.passes.analyse.check_reduction import check_reduction
from deos_fx.passes.analyse.find_sites import find_sites
from deos_fx.passes.capture.leaves import MaskBuilder, check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.lower.lower_decode import DecodeSpace, decode_spaces, lower_decode
from deos_fx.passes.lower.lower_reductions import lower_reductions
from deos_fx.passes.lower.open_space import OpenSpaces
from deos_fx.passes.lower.token_space import insert_visual_positions
from deos_fx.passes.notes import MASK, GraphNote, annotate, annotate_graph, note_of
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


def cut_after(made: Handmade, name: str, **inputs: Any) -> fx.GraphModule:
    """Open a space of two tokens after a node."""
    graph_module = made.module(**inputs)
    graph = graph_module.graph
    cut = made.node(name)
    with graph.inserting_before(graph.find_nodes(op="placeholder")[0]):
        index = graph.placeholder("index")
    with graph.inserting_after(cut):
        reduced = graph.call_function(tokens.take, (cut, index))
    OpenSpaces(graph).open(cut, reduced, index, {}, "space")
    return finish(graph_module)


INDEX = torch.tensor([[1, 5]])


# *** OpenSpaces ***


def test_sizes_after_a_cut_are_those_of_the_new_space() -> None:
    def padded(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        size = graph.call_method("size", (hidden, 1))
        more = graph.call_function(torch.add, (size, 0))
        return graph.call_method("expand", (hidden, -1, more, -1))

    made = Handmade(decoder_1=padded)
    graph_module = cut_after(made, "decoder_0")
    assert graph_module(INDEX, **made.inputs)["logits"].shape[1] == 2


def test_guards_on_lengths_after_a_cut_are_dropped() -> None:
    def guarded(graph: fx.Graph, hidden: fx.Node) -> fx.Node:
        moved = graph.call_function(torch.neg, (hidden,))
        length = graph.call_method("size", (moved, 1))
        graph.call_function(check_guard, (length, PROMPT.shape[1]))
        return moved

    made = Handmade(decoder_1=guarded)
    graph_module = cut_after(made, "decoder_0")
    assert not graph_module.graph.find_nodes(op="call_function", target=check_guard)
    assert graph_module(INDEX, **made.inputs)["logits"].shape[1] == 2


class _Masked(nn.Module):
    """A layer that reads a mask, and keeps it for the test."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.mask = attention_mask
        return hidden


def with_mask(function: Any) -> Handmade:
    """A second decoder layer with a mask of transformers, made of what it reads."""
    made = Handmade()
    made.modules["decoder_1"] = _Masked()
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, sliding_window=3)
    config._attn_implementation = "eager"
    made.modules["mask"] = MaskBuilder(function, config)
    block = made.node("decoder_1")
    with made.graph.inserting_before(block):
        kwargs = {"inputs_embeds": block.args[0], "attention_mask": None, CACHE: None}
        block.kwargs = {"attention_mask": made.graph.call_module("mask", (), kwargs)}
    return made


def distances(mask: Tensor | None) -> list[list[bool]]:
    """Which keys every query sees."""
    assert mask is not None
    return (mask[0, 0] == 0).tolist()


def test_a_plain_mask_is_made_in_the_new_space() -> None:
    made = with_mask(create_causal_mask)
    graph_module = cut_after(made, "decoder_0")
    graph_module(INDEX, **made.inputs)
    assert not [node for node in graph_module.graph.nodes if node.target is tokens.take_mask]
    assert distances(graph_module.decoder_1.mask) == [[True, False], [True, True]]


def test_a_window_is_a_distance_in_the_original_prompt() -> None:
    made = with_mask(create_sliding_window_causal_mask)
    graph_module = cut_after(made, "decoder_0")
    graph_module(INDEX, **made.inputs)
    # 5 - 1 is farther than the window of 3.
    assert distances(graph_module.decoder_1.mask) == [[True, False], [False, True]]


def test_a_new_space_reindexes_what_is_read_after_the_cut() -> None:
    graph = fx.Graph()
    names = ("x", "table", "mask", "labels", "index")
    x, table, mask, labels, index = map(graph.placeholder, names)
    cut = graph.call_function(torch.tanh, (x,))
    before = graph.call_function(torch.mul, (cut, table))
    flat = graph.call_method("flatten", (labels,))
    reduced = graph.call_function(tokens.take, (cut, index))
    after = graph.call_function(torch.add, (cut, table))
    masked = graph.call_function(torch.mul, (after, mask))
    again = graph.call_function(torch.sub, (masked, table))
    loss = graph.call_function(torch.mul, (graph.call_method("flatten", (again,)), flat))
    graph.output((before, again, loss))
    axes = {table: 1, mask: MASK, labels: 1, flat: 0, cut: 1, x: 1}
    for node in graph.nodes:
        annotate(node, axes=axes.get(node))
    spaces = OpenSpaces(graph)
    spaces.open(cut, reduced, index, {}, "space")
    result = fx.GraphModule(nn.Module(), graph)
    result.graph.lint()
    assert before.args == (cut, table), "what comes before the cut stays in the old space"
    assert after.args == (reduced, spaces.here(table)), "everything after it is in the new one"
    assert again.args[1] is spaces.here(table), "a value is re-indexed once"
    assert spaces.here(table).name == "table_space"

    x, mask, labels = torch.randn(3, 3, 7)
    table = torch.randn(1, 7)
    kept = torch.stack([torch.randperm(7)[:4].sort().values for _ in range(3)])
    old, new, loss = result(x, table, mask, labels, kept)
    assert torch.equal(old, x.tanh() * table)
    expected = ((x.tanh() + table) * mask - table).gather(1, kept)
    assert torch.equal(new, expected)
    assert torch.equal(loss, (expected * labels.gather(1, kept)).flatten())


def test_values_that_are_read_beyond_several_cuts() -> None:
    graph = fx.Graph()
    x, table, first, second = map(graph.placeholder, ("x", "table", "first", "second"))
    cut = graph.call_function(torch.tanh, (x,))
    length = graph.call_method("size", (cut, 1))
    reduced = graph.call_function(tokens.take, (cut, first))
    again = graph.call_function(torch.neg, (cut,))
    reduced_again = graph.call_function(tokens.take, (again, second))
    # Values of all three spaces, and a size of the original one.
    late = graph.call_function(torch.exp, (table,))
    after = graph.call_function(torch.add, (again, cut))
    result = graph.call_function(torch.mul, (after, late))
    result = graph.call_method("expand", (result, -1, length, -1))
    graph.output(result)
    axes = dict.fromkeys((x, table, cut, again, late), 1)
    for node in graph.nodes:
        annotate(node, axes=axes.get(node), shape=None if node in axes else ())
    spaces = OpenSpaces(graph)
    spaces.open(cut, reduced, first, {}, "one", until=after)
    spaces.open(again, reduced_again, second, {}, "two")
    graph.lint()
    x, table = torch.randn(2, 2, 9, 3)
    first = torch.stack([torch.randperm(9)[:6].sort().values for _ in range(2)])
    second = torch.stack([torch.randperm(6)[:4].sort().values for _ in range(2)])
    kept = first.gather(1, second)[..., None].expand(-1, -1, 3)
    expected = ((x.tanh() - x.tanh()) * table.exp()).gather(1, kept)
    found = fx.GraphModule(nn.Module(), graph)(x, table, first, second)
    assert torch.equal(found, expected)


def test_a_cut_after_every_layer_costs_in_proportion_to_the_layers() -> None:
    """A graph is walked once for all cuts, not once for each: 80 layers take 4 times as 20."""

    def calls(layers: int) -> int:
        made = Handmade(layers=layers)
        steps = [Reduction(f"decoder.{i}", 2, scores={"feature_norm": 1.0}) for i in range(layers)]
        graph_module = made.placed()
        sites, counted = find_sites(graph_module), 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal counted
            counted += event == "call"

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            lower_reductions(graph_module, sites, Policy(tuple(steps[:-1])), LAYOUT)
        finally:
            sys.setprofile(before)
        return counted

    calls(3)  # what is made at the first call of a process
    assert calls(80) < 4.5 * calls(20)


# *** insert_visual_positions ***


def test_visual_tokens_stand_at_the_placeholders() -> None:
    made = Handmade()
    graph_module = made.module()
    visual = insert_visual_positions(
        graph_module, find_sites(graph_module), LAYOUT, lambda f, *a: made.graph.call_function(f, a)
    )
    made.graph.output_node().args = (visual,)
    assert finish(graph_module)(**made.inputs).tolist() == [[1, 2, 3, 4]]


# *** check_reduction ***


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (Reduction("decoder.1", 2), "decoder.1 cannot be reduced: no decoder layer comes"),
        (Reduction("projector", 2, scores={"cls_attention": 1.0}), "no score 'cls_attention'"),
        (
            Reduction("decoder.0", 2, scores={"feature_norm": 1.0}, position="compact"),
            "this model's have several coordinates",
        ),
        (
            Reduction("projector", 2, selector="probe", scores={"feature_norm": 1.0}),
            "projector: the selector 'probe' .* works at decoder.<i> only",
        ),
    ],
)
def test_reductions_that_do_not_fit(reduction: Reduction, message: str) -> None:
    made = Handmade()
    with made.graph.inserting_before(made.node("input_ids")):
        made.graph.placeholder("position_ids")
    given = {"position_ids": torch.arange(PROMPT.shape[1]).expand(3, 1, -1)}
    graph_module = made.module(**given)
    with pytest.raises(ValueError, match=message):
        check_reduction(graph_module, find_sites(graph_module), reduction, LAYOUT)


def test_a_reduction_that_fits_gets_its_site() -> None:
    graph_module = Handmade().placed()
    sites = find_sites(graph_module)
    reduction = Reduction("decoder.0", PATCHES // 2, scores={"feature_norm": 1.0})
    assert check_reduction(graph_module, sites, reduction, LAYOUT) is sites["decoder.0"]


# *** lower_decode ***


def test_the_spaces_of_a_policy() -> None:
    steps = (
        Reduction("vision.1", 8, gain=1.0, mass_bias=1.0),
        Reduction("projector", 6, position="compact"),
        Reduction("decoder.2", 4, mass_bias=0.5),
    )
    # The masses of the tower arise before the decoder, and its mass bias ends with the tower.
    assert decode_spaces(Policy(steps)) == (
        DecodeSpace(0, "compact", False),
        DecodeSpace(3, "keep", True),
    )


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor, attention_mask: Any, position_ids: Tensor) -> Tensor:
        return self.weight * hidden + position_ids[..., None]


def test_layers_of_a_space_read_its_own_mask_and_positions() -> None:
    graph = fx.Graph()
    ids, mask, positions = map(graph.placeholder, ("input_ids", "attention_mask", "position_ids"))
    hidden = graph.call_module("embed", (ids,))
    for i in range(3):
        kwargs = {"attention_mask": mask, "position_ids": positions}
        hidden = graph.create_node("call_module", f"decoder_{i}", (hidden,), kwargs, f"decoder_{i}")
        annotate(hidden, block=Block("decoder", i))
    graph.output({"logits": hidden})
    layers = {f"decoder_{i}": _Layer() for i in range(3)}
    graph_module = fx.GraphModule({"embed": nn.Embedding(10, 4), **layers}, graph)
    example = {
        "input_ids": torch.ones(1, 1, dtype=torch.int64),
        "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.ones(1, 1, dtype=torch.int64),
    }
    annotate_graph(graph_module, GraphNote(ModelOutput, {}))
    annotate_token_spaces(graph_module, example)
    spaces = (DecodeSpace(1, "compact", False), DecodeSpace(2, "keep", False))
    lowered = lower_decode(graph_module, spaces)
    read = {
        node.name: [node.kwargs[name].name for name in ("attention_mask", "position_ids")]
        for node in lowered.graph.find_nodes(op="call_module")
        if note_of(node).block
    }
    assert read == {
        "decoder_0": ["attention_mask", "position_ids"],
        "decoder_1": ["attention_mask_1", "position_ids_1"],
        # The rule `keep` keeps the positions of the space before, which have moved.
        "decoder_2": ["attention_mask_2", "position_ids_1"],
    }
