"""The places whose logits a graph computes become an input."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from deos_fx.passes.rewrite.select_logits import LOGITS, places_of, select_logits


class Layer(nn.Module):
    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        return hidden + 1


def head(*, layers: int = 0, further: bool = False, written_out: bool = True) -> fx.GraphModule:
    """``hidden[:, -n:]``, behind layers that take n as well."""
    root = nn.Module()
    graph = fx.Graph()
    hidden = graph.placeholder("hidden")
    number = graph.placeholder(LOGITS)
    for i in range(layers):
        root.add_module(f"layer_{i}", Layer())
        hidden = graph.call_module(f"layer_{i}", (hidden,), {LOGITS: number})
    last = slice(graph.call_function(operator.neg, (number,)), None, None)
    where = (slice(None), last, slice(None)) if written_out else (slice(None), last)
    logits = graph.call_function(operator.getitem, (hidden, where))
    if further:
        logits = graph.call_function(operator.mul, (logits, number))
    graph.output(logits)
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("written_out", [True, False])
def test_a_number_of_logits_becomes_places(layers: int, written_out: bool) -> None:
    hidden = torch.arange(42.0).reshape(2, 7, 3)
    graph_module = head(layers=layers, written_out=written_out)
    expected = graph_module(hidden, 3)
    chosen = select_logits(graph_module)
    assert torch.equal(chosen(hidden, torch.tensor([-3, -2, -1])), expected)
    # In any order, from either end.
    mixed = torch.tensor([0, -1, 2])
    assert torch.equal(chosen(hidden, mixed), (hidden + layers)[:, [0, 6, 2]])
    assert not chosen.graph.find_nodes(op="call_function", target=operator.neg)


def test_a_graph_without_the_argument_stays_as_it_is() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("hidden"))
    before = fx.GraphModule(nn.Module(), graph)
    code = before.code
    assert select_logits(before).code == code


def test_other_uses_of_the_number_are_refused() -> None:
    with pytest.raises(ValueError, match="more with logits_to_keep than cutting"):
        select_logits(head(further=True))


def test_places_count_from_either_end() -> None:
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    assert places_of(hidden, torch.tensor([-1, 0, -5])).flatten().tolist() == [4, 0, 0]
