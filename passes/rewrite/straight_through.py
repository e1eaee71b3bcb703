"""Gradients through linear layers whose own code hands on none, or wrong ones.

Quantised layers round what comes in, where a derivative is zero, or are written for inference
alone. What they compute is linear but for the rounding, and that map has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from deos_fx.models.layers import linear_sizes, with_layers

__all__ = ["StraightThrough", "straight_through"]

# Rows of the identity that a layer is given at once.
_ROWS = 1024
# How far a layer's own gradient may be off, as a share: eight bits are within a hundredth.
_ROUNDING = 0.1


def straight_through(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Run every quantised linear layer so that gradients pass it.

    Args:
        graph_module: A captured graph. Changed in place; the model's own modules are not.

    Returns:
        The same graph module.
    """
    for target in {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}:
        module = graph_module.get_submodule(target)
        view = with_layers(module, _wrapped)
        if view is not module:
            graph_module.set_submodule(target, view)
    return graph_module


def _wrapped(layer: nn.Module) -> nn.Module:
    return layer if linear_sizes(layer) is None else StraightThrough(layer)


class StraightThrough(nn.Module):
    """A linear layer that computes what it does, with the gradient of its linear map.

    Where that is the gradient that its own code gives, as is found out once, its own is taken.

    Args:
        layer: The layer, whose weights need no gradient.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._own: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply it.

        Args:
            x: [..., in_features].

        Returns:
            [..., out_features].
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.layer(x)
        if self._own is None:
            self._own = _has_gradient(self.layer, x)
        return self.layer(x) if self._own else _Through.apply(x, self.layer)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        return layer(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        size, _ = linear_sizes(ctx.layer) or (0, 0)
        columns = []
        for start in range(0, size, _ROWS):
            rows = torch.zeros(min(_ROWS, size - start), size, dtype=ctx.dtype)
            rows.diagonal(start).fill_(1)
            columns.append(gradient @ _linear(ctx.layer, rows.to(gradient.device)).mT.to(gradient))
        return torch.cat(columns, dim=-1).to(ctx.dtype), None


@torch.no_grad()
def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer computes, without its bias."""
    return layer(x) - layer(torch.zeros_like(x[:1]))


def _has_gradient(layer: nn.Module, like: Tensor) -> bool:
    """Whether a layer's own gradient at one place is what it does to another."""
    size = like.shape[-1]
    pair = torch.randn(2, 1, size, generator=torch.Generator().manual_seed(0)).to(like)
    here, there = pair[0].requires_grad_(), pair[1]
    along = _linear(layer, there)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(layer(here), here, along)
    except Exception:
        # Libraries say in many ways that a layer is for inference alone.
        return False
    expected = along.float().square().sum()
    return bool(((gradient * there).float().sum() - expected).abs() < _ROUNDING * expected)
