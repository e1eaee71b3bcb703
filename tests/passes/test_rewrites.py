"""The rewrites on small graphs: what changes, what does not, and that the values stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from deos_fx.errors import CaptureError, GuardError
from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.notes import annotate
from deos_fx.passes.rewrite.fold_masked_add import fold_masked_add, visual_rows
from deos_fx.passes.rewrite.fold_unstack import fold_unstack
from deos_fx.passes.rewrite.split_encoder import features_of, split_encoder

# *** fold_masked_add ***

IDS = torch.tensor([[9, 1, 9, 2], [3, 9, 9, 4]])


def deep_stack(axes: int, change: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.GraphModule:
    """``x[mask] = change(x[mask])``, with a mask that lacks some axes of the hidden states."""
    graph = fx.Graph()
    ids, hidden, rows = map(graph.placeholder, ("input_ids", "hidden", "rows"))
    mask = graph.call_function(torch.eq, (ids, 9))
    for _ in range(1 - axes):
        mask = graph.call_method("unsqueeze", (mask, -1))
        mask = graph.call_method("expand_as", (mask, hidden))
    key = (mask, slice(None)) if axes else mask
    read = graph.call_function(operator.getitem, (hidden, key))
    annotate(read, masked=axes)
    if not axes:
        rows = graph.call_method("flatten", (rows,))
    total = change(graph, graph.call_function(torch.add, (read, rows)))
    if axes:
        mask = graph.call_method("unsqueeze", (mask, -1))
    graph.output(graph.call_method("masked_scatter", (hidden, mask, total)))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("axes", [0, 1])
def test_features_added_to_masked_rows_become_a_sum(axes: int) -> None:
    graph_module = deep_stack(axes, lambda graph, total: total)
    hidden, rows = torch.randn(2, 4, 3), torch.randn(4, 3)
    expected = hidden.clone()
    expected[IDS == 9] += rows
    assert torch.equal(graph_module(IDS, hidden, rows), expected)
    folded = fold_masked_add(graph_module)
    called = [node.target for node in folded.graph.nodes]
    assert visual_rows in called and "masked_scatter" not in called
    assert torch.equal(folded(IDS, hidden, rows), expected)


@pytest.mark.parametrize("shaped", ["view", "reshape", "flatten"])
@pytest.mark.parametrize("plus", [torch.add, operator.add])
@pytest.mark.parametrize("expanded", [False, True])
def test_a_sum_is_found_however_it_is_written(shaped: str, plus: Any, expanded: bool) -> None:
    size = (0,) if shaped == "flatten" else (-1,)
    graph = fx.Graph()
    ids, hidden, rows = map(graph.placeholder, ("input_ids", "hidden", "rows"))
    mask = graph.call_method("unsqueeze", (graph.call_function(torch.eq, (ids, 9)), -1))
    wide = graph.call_method("expand", (mask, -1, -1, 3))
    wide = graph.call_method("expand_as", (wide, hidden)) if expanded else wide
    clone = graph.call_method("clone", (hidden,))
    read = graph.call_function(operator.getitem, (clone, wide))
    annotate(read, masked=0)
    total = graph.call_function(plus, (graph.call_method(shaped, (rows, *size)), read))
    total = graph.call_method(shaped, (total, *size))
    graph.output(
        graph.call_method("masked_scatter", (graph.call_method("clone", (hidden,)), wide, total))
    )
    graph_module = fx.GraphModule(nn.Module(), graph)
    inputs = IDS, torch.randn(2, 4, 3), torch.randn(4, 3)
    expected = graph_module(*inputs)
    folded = fold_masked_add(graph_module)
    (sum_,) = folded.graph.find_nodes(op="call_function", target=visual_rows)
    # The mask and the features as they were before they were made fit for the scatter.
    assert [node.name for node in sum_.args] == ["unsqueeze", "rows"]
    assert torch.equal(folded(*inputs), expected)


def test_other_scatters_stay_as_they_are() -> None:
    graph = fx.Graph()
    ids, hidden, rows = map(graph.placeholder, ("input_ids", "hidden", "rows"))
    mask = graph.call_method("unsqueeze", (graph.call_function(torch.eq, (ids, 9)), -1))
    # Features in the place of embeddings, and a sum of something else.
    for total in (rows, graph.call_function(torch.add, (rows, rows))):
        hidden = graph.call_method("masked_scatter", (hidden, mask, total))
    graph.output(hidden)
    graph_module = fx.GraphModule(nn.Module(), graph)
    before = str(graph)
    assert str(fold_masked_add(graph_module).graph) == before


def test_masked_rows_that_are_read_for_something_else_are_refused() -> None:
    graph_module = deep_stack(1, lambda graph, total: graph.call_function(torch.tanh, (total,)))
    with pytest.raises(CaptureError, match="reads the rows of a tensor that a mask selects"):
        fold_masked_add(graph_module)


def test_rows_of_images_may_be_selected() -> None:
    graph = fx.Graph()
    pixels = graph.placeholder("pixel_values")
    read = graph.call_function(
        operator.getitem, (pixels, graph.call_function(torch.gt, (pixels, 0)))
    )
    annotate(read, masked=0)
    graph.output(read)
    folded = fold_masked_add(fx.GraphModule(nn.Module(), graph))
    assert folded(torch.tensor([1.0, -1.0])).tolist() == [1.0]


# *** fold_unstack ***


def unrolled(rows: int) -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    parts = graph.call_function(torch.unbind, (graph.placeholder("x"),))
    annotate(parts, unrolled=rows)
    return graph, [graph.call_function(operator.getitem, (parts, i)) for i in range(rows)]


def test_unrolled_rows_that_are_joined_again_become_a_reshape() -> None:
    graph, rows = unrolled(2)
    graph.output(graph.call_function(torch.cat, (rows,), {"dim": 0}))
    folded = fold_unstack(fx.GraphModule(nn.Module(), graph))
    assert [node.target for node in folded.graph.nodes] == ["x", "flatten", "output"]
    x = torch.randn(3, 4, 5)
    assert torch.equal(folded(x), x.flatten(0, 1))


def test_unrolled_rows_that_are_flattened_and_joined_become_a_reshape() -> None:
    graph, rows = unrolled(2)
    flat = [graph.call_method("flatten", (row, 0, 1)) for row in rows]
    graph.output(graph.call_function(torch.cat, (flat,), {"dim": 0}))
    folded = fold_unstack(fx.GraphModule(nn.Module(), graph))
    assert [node.target for node in folded.graph.nodes] == ["x", "flatten", "output"]
    x = torch.randn(3, 4, 5)
    assert torch.equal(folded(x), x.flatten(0, 2))


def test_a_guard_on_the_number_of_rows_that_are_joined_again_goes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    parts = graph.call_function(torch.unbind, (x,))
    annotate(parts, unrolled=2)
    graph.call_function(check_guard, (graph.call_function(len, (x,)), 2))
    rows = [graph.call_function(operator.getitem, (parts, i)) for i in range(2)]
    graph.output(graph.call_function(torch.cat, (rows,)))
    folded = fold_unstack(fx.GraphModule(nn.Module(), graph))
    x = torch.randn(3, 4, 5)
    assert torch.equal(folded(x), x.flatten(0, 1))


@pytest.mark.parametrize("how", ["added", "turned", "joined elsewhere"])
def test_what_cannot_be_folded_is_guarded(how: str) -> None:
    graph, rows = unrolled(2)
    if how == "added":
        result = graph.call_function(torch.add, tuple(rows))
    elif how == "turned":
        result = graph.call_function(torch.cat, (rows[::-1],))
    else:
        result = graph.call_function(torch.cat, (rows,), {"dim": 1})
    graph.output(result)
    guarded = fold_unstack(fx.GraphModule(nn.Module(), graph))
    guarded(torch.randn(2, 4, 5))
    with pytest.raises(GuardError, match="captured for 2, called with 3"):
        guarded(torch.randn(3, 4, 5))


# *** split_encoder ***


class _Encoder(nn.Module):
    def __init__(self, levels: object) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, pixels: Tensor, sizes: Tensor) -> object:
        output = type("Output", (), {})()
        output.pooler_output = (pixels * sizes[:, None],)
        output.levels = self.levels or [pixels + 1, pixels + 2]
        return output


def encoding(levels: object = None) -> fx.GraphModule:
    """A graph that adds to its prompt what an opaque encoder makes of images."""
    graph = fx.Graph()
    ids, pixels, sizes = map(graph.placeholder, ("input_ids", "pixel_values", "sizes"))
    number = graph.call_function(operator.getitem, (graph.call_method("tolist", (sizes,)), 0))
    graph.call_function(check_guard, (number, 2))
    length = graph.call_function(len, (ids,))
    graph.call_function(check_guard, (length, 3))
    encoder = graph.call_module("image_encoder", (pixels, sizes))
    pooled = graph.call_function(getattr, (encoder, "pooler_output"))
    level = graph.call_function(getattr, (encoder, "levels"))
    first = graph.call_function(operator.getitem, (pooled, 0))
    second = graph.call_function(operator.getitem, (level, 1))
    total = graph.call_function(torch.add, (first, second))
    graph.output(graph.call_function(torch.add, (ids, total)))
    return fx.GraphModule({"image_encoder": _Encoder(levels)}, graph)


def test_an_encoder_and_the_rest_do_what_they_did_together() -> None:
    graph_module = encoding()
    ids, pixels, sizes = torch.arange(3), torch.randn(3, 3), torch.tensor([2, 3, 4])
    expected = graph_module(ids, pixels, sizes)
    encode = split_encoder(graph_module, {"pixel_values": pixels, "sizes": sizes})
    finish(graph_module)
    pooled, levels = encode(pixels, sizes)
    given = {f"image_features_{i}": value for i, value in enumerate([*pooled, *levels])}
    inputs = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    assert set(inputs[:3]) == given.keys()
    rest = graph_module(input_ids=ids, pixel_values=None, sizes=None, **given)
    assert torch.equal(rest, expected)
    with pytest.raises(GuardError, match="captured for 3"):
        graph_module(input_ids=torch.arange(4), pixel_values=None, sizes=None, **given)


def test_numbers_beside_features_are_constants() -> None:
    """The layers that features are for follow from no pixels."""
    ids, pixels, sizes = torch.arange(3), torch.randn(3, 3), torch.tensor([2, 3, 4])
    graph_module = encoding(levels=[3, 4])
    expected = graph_module(ids, pixels, sizes)
    encode = split_encoder(graph_module, {"pixel_values": pixels, "sizes": sizes})
    finish(graph_module)
    (pooled,) = features_of(encode(pixels, sizes))
    given = {"image_features_0": pooled, "pixel_values": None, "sizes": None}
    assert torch.equal(graph_module(input_ids=ids, **given), expected)
    with pytest.raises(ValueError, match="gives 3 in place of features"):
        split_encoder(encoding(levels=3), {"pixel_values": pixels, "sizes": sizes})
