"""Gradients of rounded layers in a graph built by hand, against those of the linear map."""

from __future__ import annotations

import torch
from closeness import assert_close
from torch import Tensor, fx, nn

from deos_fx.passes.rewrite.straight_through import StraightThrough, straight_through


class _Rounded(nn.Module):
    """A linear layer with integer weights that rounds its input, as quantised layers do."""

    in_features, out_features = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.randint(-9, 9, (3, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * 64).round() / 64 @ self.codes.T.float()


def graph_of(layer: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    hidden = graph.call_module("plain", (graph.placeholder("x"),))
    graph.output(graph.call_module("block", (hidden,)))
    return fx.GraphModule({"plain": nn.Linear(6, 6), "block": nn.Sequential(layer)}, graph)


def test_only_rounded_layers_are_wrapped_and_the_model_stays() -> None:
    layer = _Rounded()
    graph_module = graph_of(layer)
    plain, block = graph_module.plain, graph_module.block
    straight_through(graph_module)
    assert graph_module.plain is plain
    assert isinstance(graph_module.block[0], StraightThrough)
    assert block[0] is layer, "the model's own module is not changed"


def test_the_gradient_is_that_of_the_linear_map() -> None:
    graph_module = graph_of(_Rounded())
    x = torch.randn(2, 6, requires_grad=True)
    before = graph_module(x)
    (none,) = torch.autograd.grad(before.sum(), x)
    assert not none.any(), "the derivative of rounding is zero"
    output = straight_through(graph_module)(x)
    assert torch.equal(output, before)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    matrix = graph_module.block[0].layer.codes.float()
    assert_close(gradient, torch.ones(2, 3) @ matrix @ graph_module.plain.weight)
