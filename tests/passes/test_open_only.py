"""Layers with a state in relaxed graphs: only tokens with open gates pass them."""

from __future__ import annotations

import torch
from closeness import assert_close
from torch import Tensor, fx, nn

from deos_fx.models.blocks import Block
from deos_fx.passes.lower.open_only import OpenOnly, open_only
from deos_fx.passes.notes import annotate


class Sums(nn.Module):
    """A layer whose state is the sum of what it has read."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        read = hidden if attention_mask is None else hidden * attention_mask[:, :, None]
        return hidden + read.cumsum(dim=1)


HIDDEN = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
# Three of five gates are open, others in each row.
GATES = torch.tensor([[1.0, 0.9, 0.05, 1.0, 0.05], [1.0, 0.1, 0.95, 0.95, 0.0]])
OPEN = torch.tensor([[0, 1, 3], [0, 2, 3]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_closed_tokens_go_around_the_layer() -> None:
    result = OpenOnly(Sums())(HIDDEN, gates=GATES, attention_mask=MASK)
    for row, places in enumerate(OPEN):
        alone = HIDDEN[row, places][None]
        expected = HIDDEN[row].clone()
        expected[places] = Sums()(alone, MASK[row, places][None])[0]
        assert_close(result[row], expected)


def test_gates_have_the_gradient_of_a_scale_on_what_is_read() -> None:
    gates = GATES.clone().requires_grad_()
    weight = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    layer = OpenOnly(Sums())
    (layer(HIDDEN, gates=gates, attention_mask=None) * weight).sum().backward()
    for row, places in enumerate(OPEN):
        # What a token writes is in the sums of all tokens after it.
        later = weight[row, places].flip(0).cumsum(dim=0).flip(0)
        expected = torch.zeros(5)
        expected[places] = (HIDDEN[row, places] * later).sum(dim=-1) / GATES[row, places]
        assert gates.grad is not None
        assert_close(gates.grad[row], expected)


def test_only_layers_with_a_mask_of_padding_are_changed() -> None:
    graph = fx.Graph()
    hidden, first, second = (graph.placeholder(name) for name in ("hidden", "first", "second"))
    causal, padding = graph.placeholder("causal"), graph.placeholder("padding")
    annotate(padding, padding=True)
    layers = []
    for i, mask in enumerate((causal, padding, None)):
        hidden = graph.call_module(f"layer_{i}", (hidden,), {"attention_mask": mask})
        annotate(hidden, block=Block("decoder", i))
        layers.append(hidden)
    graph.output(hidden)
    graph_module = fx.GraphModule({f"layer_{i}": Sums() for i in range(3)}, graph)
    for gates in (first, second):
        for layer in layers:
            open_only(graph_module, layer, gates)
    assert [layer.kwargs.get("gates") for layer in layers] == [None, second, None]
    kinds = [type(graph_module.get_submodule(f"layer_{i}")) for i in range(3)]
    assert kinds == [Sums, OpenOnly, Sums]
    assert isinstance(graph_module.get_submodule("layer_1").layer, Sums)
