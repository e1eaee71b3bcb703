"""Gradients of rounded layers in a graph built by hand, against those of the linear map."""

from __future__ import annotations

import pytest
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


class _Scaled(nn.Module):
    """A linear layer with a bias whose own gradient is off by a factor."""

    in_features, out_features = 6, 3

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.randint(-9, 9, (3, 6), dtype=torch.int8))
        self.bias = nn.Buffer(torch.randn(3))
        self.factor = factor
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = x @ self.codes.T.to(x.dtype)
        return self.factor * y + (1 - self.factor) * y.detach() + self.bias.to(x.dtype)


def test_without_gradients_the_layer_is_called_and_no_more() -> None:
    layer = _Scaled(0.0)
    wrapped, x = StraightThrough(layer), torch.randn(2, 6)
    assert torch.equal(wrapped(x), layer(x))
    assert layer.calls == 2
    with torch.no_grad():
        wrapped(x.requires_grad_())
    assert layer.calls == 3


def test_a_right_gradient_of_the_layer_is_used_and_tested_once() -> None:
    layer = _Scaled(0.95)
    wrapped, x = StraightThrough(layer), torch.randn(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(wrapped(x).sum(), x)
    assert_close(gradient, 0.95 * torch.ones(2, 3) @ layer.codes.float())
    before = layer.calls
    wrapped(x)
    assert layer.calls == before + 1


@pytest.mark.parametrize("factor", [0.0, 0.8, 1.2, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_of_the_layer_is_replaced(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last rows of the identity are fewer than the others.
    monkeypatch.setattr("deos_fx.passes.rewrite.straight_through._ROWS", 4)
    layer = _Scaled(factor)
    x = torch.randn(2, 6, dtype=dtype, requires_grad=True)
    output = StraightThrough(layer)(x)
    assert torch.equal(output, layer(x))
    given = torch.randn(2, 3).to(dtype)
    (gradient,) = torch.autograd.grad(output, x, given)
    assert gradient.dtype == dtype
    assert_close(gradient, given @ layer.codes.to(dtype))


def test_a_layer_for_inference_alone_gets_a_gradient() -> None:
    class Inference(_Rounded):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise NotImplementedError
            return super().forward(x)

    layer, x = Inference(), torch.randn(1, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(StraightThrough(layer)(x).sum(), x)
    assert_close(gradient, layer.codes.float().sum(dim=0, keepdim=True))


def test_layers_of_no_known_size_stay() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Buffer(torch.ones(2, dtype=torch.int8))

    graph = fx.Graph()
    graph.output(graph.call_module("part", (graph.placeholder("x"),)))
    other = Other()
    assert straight_through(fx.GraphModule({"part": other}, graph)).part is other
