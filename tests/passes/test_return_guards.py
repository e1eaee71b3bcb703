"""Guards on the contents of tensors become outputs; guards on sizes stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from deos_fx.errors import GuardError
from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.notes import annotate
from deos_fx.passes.rewrite.return_guards import return_guards


def _graph() -> fx.GraphModule:
    """``if x.any() and len(x) == 2: return {"y": -x}``, as it is captured."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    found, length = graph.call_method("any", (x,)), graph.call_function(len, (x,))
    annotate(graph.call_function(check_guard, (found, True)), reads=True)
    graph.call_function(check_guard, (length, 2))
    graph.output({"y": graph.call_function(torch.neg, (x,))})
    return fx.GraphModule(nn.Module(), graph)


def test_what_is_read_of_a_tensor_is_returned() -> None:
    graph_module = _graph()
    with pytest.raises(GuardError):
        graph_module(torch.zeros(2))
    assert return_guards(graph_module) == (True,)
    for x in (torch.zeros(2), torch.ones(2)):
        fields = graph_module(x)
        assert torch.equal(fields["y"], -x)
        assert [value.item() for value in fields["guards"]] == [bool(x.any())]
    with pytest.raises(GuardError):
        graph_module(torch.ones(3))


def test_a_graph_without_such_guards_stays_as_it_is() -> None:
    graph_module = _graph()
    return_guards(graph_module)
    code = graph_module.code
    assert return_guards(graph_module) == ()
    assert graph_module.code == code
