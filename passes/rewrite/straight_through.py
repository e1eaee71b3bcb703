"""Give gradients to linear layers whose own code returns none, or wrong ones.

Some quantised layers round their input, and the derivative of rounding is zero; others are written
for inference alone. Apart from the rounding, all of them compute a linear map, whose gradient is
known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from deos_fx.models.views import linear_sizes, with_layers

__all__ = ["StraightThrough", "straight_through"]

# Rows of the identity matrix that a layer is given at once: a whole one may not fit in memory.
_ROWS = 1024
# Largest relative error of a gradient that counts as right; it is below 0.01 with eight bits.
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
        # A view, so that the model keeps its own layers.
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
        # Whether the layer's own gradient is right; None until the first call that needs one.
        self._own: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in_features].

        Returns:
            [..., out_features].
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            # Case: no gradient is asked for.
            return self.layer(x)
        if self._own is None:
            self._own = _has_gradient(self.layer, x)
        return self.layer(x) if self._own else _Through.apply(x, self.layer)


class _Through(torch.autograd.Function):
    """Applies a layer in the forward pass, and its matrix in the backward pass.

    The matrix is found by running the layer on rows of the identity.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        return layer(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # gradient @ W, for some columns of W [out_features, in_features] at a time.
        (gradient,) = gradients
        # The layer is linear, or it would not have been wrapped.
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
    # What the layer makes of zeros is its bias.
    return layer(x) - layer(torch.zeros_like(x[:1]))


def _has_gradient(layer: nn.Module, like: Tensor) -> bool:
    """Return whether a layer's own gradient is that of its linear map W.

    With the vector-Jacobian product g = W' (W t) at one input, g . t has to be |W t|^2 for another
    input t.
    """
    size = like.shape[-1]
    # Fixed noise: the answer must not differ from run to run, nor touch the user's generator.
    pair = torch.randn(2, 1, size, generator=torch.Generator().manual_seed(0)).to(like)
    # The Jacobian of a linear map is the same at every input.
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
