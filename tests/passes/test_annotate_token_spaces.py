"""Which axes run over the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import PATCHES, PROMPT, WIDTH, Handmade
from torch import fx
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from deos_fx.errors import CaptureError
from deos_fx.models.upstream import CACHE
from deos_fx.passes.analyse.annotate_token_spaces import annotate_token_spaces, padding_node
from deos_fx.passes.capture.leaves import MaskBuilder, check_guard
from deos_fx.passes.notes import MASK, note_of

LENGTH = PROMPT.shape[1]


def test_values_of_the_prompt_have_an_axis_and_those_of_images_none() -> None:
    made = Handmade()
    made.module()
    found = {node.name: note_of(node) for node in made.graph.nodes}
    of_prompt = {name for name, note in found.items() if note.axes is not None}
    inside = {"embedding", "eq", "unsqueeze", "masked_scatter", "decoder_0", "decoder_1", "head"}
    assert of_prompt == {"input_ids", *inside}
    assert found["projector"].shape == (1, PATCHES, WIDTH)
    assert found["decoder_0"].shape == (1, LENGTH, WIDTH)
    assert found["decoder_0"].dtype == torch.float32
    assert found["masked_scatter"].content and not found["eq"].content


def test_what_reads_only_a_shape_has_no_content() -> None:
    made = Handmade()
    with made.graph.inserting_after(made.merged):
        zeros = made.graph.call_function(torch.zeros_like, (made.merged,))
    with made.graph.inserting_after(zeros):
        total = made.graph.call_function(torch.add, (made.merged, zeros))
    made.node("decoder_0").args = (total,)
    made.module()
    assert note_of(zeros).axes == 1 and not note_of(zeros).content
    assert note_of(total).content


def test_axes_are_found_wherever_they_are() -> None:
    graph = fx.Graph()
    ids, table = map(graph.placeholder, ("input_ids", "table"))
    flat = graph.call_method("flatten", (ids,))
    third = graph.call_method("expand", (ids, 3, 2, -1))
    pair = graph.call_function(torch.stack, ([ids, ids],), {"dim": -1})
    parts = graph.call_method("unbind", (pair, -1))
    graph.output((flat, third, parts, table))
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "table": torch.ones(5, 5)}
    annotate_token_spaces(fx.GraphModule({}, graph), inputs)
    assert [note_of(node).axes for node in (ids, flat, third, pair)] == [1, 0, 2, 1]
    assert note_of(parts).axes == (1, 1)
    # Floats belong to images, whose sides may equal the length of the prompt.
    assert note_of(table).axes is None


def test_values_of_pairs_of_tokens_are_refused() -> None:
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    column = graph.call_method("unsqueeze", (ids, -1))
    row = graph.call_method("unsqueeze", (ids, 1))
    graph.output(graph.call_function(torch.eq, (column, row)))
    with pytest.raises(CaptureError, match="a number for every pair of tokens"):
        annotate_token_spaces(fx.GraphModule({}, graph), {"input_ids": PROMPT})


def test_what_only_guards_read_is_not_run() -> None:
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    number = graph.call_method("item", (graph.call_method("sum", (ids,)),))
    graph.call_function(check_guard, (number, 3))
    graph.output(graph.call_function(torch.neg, (ids,)))
    annotate_token_spaces(fx.GraphModule({}, graph), {"input_ids": PROMPT})
    assert note_of(number).axes is None


def masked(function: Callable[..., Any], given: torch.Tensor) -> tuple[fx.GraphModule, fx.Node]:
    """A graph that makes a mask of embeddings by a function of transformers."""
    graph = fx.Graph()
    hidden, flags = map(graph.placeholder, ("hidden", "attention_mask"))
    ids = graph.placeholder("input_ids")
    added = graph.call_function(torch.add, (hidden, graph.call_method("unsqueeze", (ids, -1))))
    kwargs = {"inputs_embeds": added, "attention_mask": flags, CACHE: None}
    mask = graph.call_module("mask", (), kwargs)
    graph.output((added, mask))
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, sliding_window=2)
    config._attn_implementation = "eager"
    graph_module = fx.GraphModule({"mask": MaskBuilder(function, config)}, graph)
    inputs = {"hidden": torch.ones(1, 1, 8), "attention_mask": given, "input_ids": PROMPT}
    return annotate_token_spaces(graph_module, inputs), mask


def test_masks_are_plain_if_only_order_and_padding_matter() -> None:
    flags = torch.ones(1, LENGTH, dtype=torch.int64)
    graph_module, mask = masked(create_causal_mask, flags)
    assert (note_of(mask).axes, note_of(mask).plain) == (MASK, True)
    padding = padding_node(graph_module)
    assert padding is not None and note_of(padding).axes == 1
    _, mask = masked(create_sliding_window_causal_mask, flags)
    assert (note_of(mask).axes, note_of(mask).plain) == (MASK, False)


def test_a_mask_of_queries_and_keys_is_no_padding() -> None:
    whole = torch.zeros(1, 1, LENGTH, LENGTH)
    graph_module, mask = masked(create_causal_mask, whole)
    assert note_of(mask).plain is False
    assert padding_node(graph_module) is None
