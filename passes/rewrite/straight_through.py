"""Give gradients to linear layers whose own code returns none, or wrong ones.

Quantised layers round their input, and the derivative of rounding is zero, or they are written for
inference alone. Apart from the rounding they compute a linear map, and this map has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from deos_fx.models.views import linear_sizes, with_layers

__all__ = ["StraightThrough", "straight_through"]

# Rows of the identity matrix that a layer is given at once.
_ROWS = 1024
# Largest relative error of a layer's own gradient; with eight bits it is below a hundredth.
_ROUNDING = 0.1


def straight_through(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Let gradients pass every quantised linear layer.

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
    """Wrap a quantised linear layer; other layers stay as they are."""
    return layer if linear_sizes(layer) is None else StraightThrough(layer)


class StraightThrough(nn.Module):
    """A linear layer with unchanged outputs and the gradient of its linear map.

    If the layer's own gradient is right, which is tested once, that one is used.

    Args:
        layer: The layer, whose weights need no gradient.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._own: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

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
    """Applies a layer forwards and its matrix, found by running it on the identity, backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        return layer(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # gradient @ W, for some columns of W [out_features, in_features] at a time.
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
    """Apply a layer without its bias."""
    return layer(x) - layer(torch.zeros_like(x[:1]))


def _has_gradient(layer: nn.Module, like: Tensor) -> bool:
    """Return whether a layer's own gradient is that of its linear map W.

    With the vector-Jacobian product g = W' (W t) at one input, g . t has to be |W t|^2 for another
    input t.
    """
    size = like.shape[-1]
    pair = torch.randn(2, 1, size, generator=torch.Generator().manual_seed(0)).to(like)
    here, there = pair[0].requires_grad_(), pair[1]
    along = _linear(layer, there)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(layer(here), here, along)
    except Exception:
        # Libraries raise errors of many types for a layer that is for inference alone.
        return False
    expected = along.float().square().sum()
    return bool(((gradient * there).float().sum() - expected).abs() < _ROUNDING * expected)
