"""Graphs that torch.compile takes as a whole."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from deos_fx.errors import GuardError
from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.rewrite.make_compilable import make_compilable


class Hooked(nn.Module):
    """A layer with the hook that transformers hangs on it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.utils.output_capturing import install_output_capuring_hook

        install_output_capuring_hook(self, "hidden_states", 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2


def test_no_guard_and_no_recording_hook_breaks_the_compiled_graph() -> None:
    graph = fx.Graph()
    hidden = graph.placeholder("hidden")
    first = graph.call_method("item", (graph.call_function(operator.getitem, (hidden, (0, 0))),))
    graph.call_function(check_guard, (first, 1.0))
    graph.output({"logits": graph.call_module("layer", (hidden,))})
    graph_module = finish(fx.GraphModule({"layer": Hooked()}, graph))
    with pytest.raises(GuardError):
        graph_module(torch.zeros(2, 3))
    rest = make_compilable(graph_module)
    assert not rest.graph.find_nodes(op="call_method", target="item")
    rest.compile(fullgraph=True, backend="eager")
    hidden = torch.rand(2, 3)
    assert torch.equal(rest(hidden)["logits"], hidden * 2)
