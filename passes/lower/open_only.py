"""Let gates reach layers that convolve or keep a state, in relaxed graphs.

Attention takes a gate as a bias on a key. A state has no keys: whatever a layer reads changes it,
and what a token writes the next ones find. So such a layer runs over the tokens with open gates
alone, in the sequence that the static form would give it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from deos_fx.passes.graph import attends
from deos_fx.tokens import take

__all__ = ["OpenOnly", "open_only"]


def open_only(graph_module: fx.GraphModule, layer: fx.Node, gates: fx.Node) -> None:
    """Let only tokens with open gates pass a layer, if it does not attend but has a mask.

    Args:
        graph_module: The graph. Changed in place.
        layer: call_module node of a decoder layer.
        gates: Node of the gates [B, M] of its tokens; they replace earlier ones.
    """
    if attends(layer) or layer.kwargs["attention_mask"] is None:
        # Case: attention, which takes a bias, or a layer that looks at each token alone.
        return
    if "gates" not in layer.kwargs:
        inner = graph_module.get_submodule(str(layer.target))
        graph_module.set_submodule(str(layer.target), OpenOnly(inner))
    layer.update_kwarg("gates", gates)


class OpenOnly(nn.Module):
    """A layer that tokens with closed gates go around: they keep their hidden states.

    Open gates have the value 1, whatever they are. Their gradient is that of a scale on what the
    layer reads: its mask of padding is such a scale in transformers' layers.

    Args:
        layer: A layer that takes a mask of padding.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden: Tensor,
        *args: Any,
        gates: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden: [B, M, d].
            *args: Other arguments of the layer.
            gates: [B, M], at most 1, and 1 for text. As many tokens pass as they sum to.
            attention_mask: Flags [B, M] of the tokens that are not padding, or None.
            **kwargs: Other arguments of the layer.

        Returns:
            [B, M, d].
        """
        count = max(1, round(gates.sum(dim=-1).mean().item()))
        index = gates.detach().topk(count, dim=-1).indices.sort(dim=-1).values
        passing = take(gates, index)
        mask = passing / passing.detach()
        if attention_mask is not None:
            mask = mask * take(attention_mask, index)
        result = self.layer(take(hidden, index), *args, attention_mask=mask, **kwargs)
        return hidden.scatter(1, index.unsqueeze(-1).expand_as(result), result)
