"""A decoder layer in a turn with images, whose tokens also see the turns before."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deos_fx.attention.mask import attention_of
from deos_fx.models.upstream import CACHE
from deos_fx.tokens.turn import TurnCache

__all__ = ["ContinuedLayer"]


class ContinuedLayer(nn.Module):
    """A decoder layer that is given a mask of the new tokens and attends to those of all turns.

    Args:
        layer: The model's own layer; its weights are shared.
        index: Its number.

    Raises:
        ValueError: If its attention implementation takes no mask of queries and keys.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        implementation = str(attention_of(layer).config._attn_implementation)
        if implementation.startswith(("flash", "flex", "kernels")):
            raise ValueError(
                f"The attention implementation {implementation!r} takes no mask that says which "
                "tokens of earlier turns are left, so a later turn cannot bring images. Load the "
                "model with attn_implementation='sdpa', or give all images in the first turn."
            )

    def forward(
        self,
        hidden: Tensor,
        *args: Any,
        attention_mask: Tensor | None,
        places: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the layer.

        Args:
            hidden: [B, M, d] of the new tokens.
            *args: Other arguments of the layer.
            attention_mask: Their mask, see `TurnCache.widened`.
            places: [B, M] which tokens of the turn they are; None for all.
            **kwargs: Other arguments of the layer, with the cache.

        Returns:
            What the layer returns.
        """
        cache: TurnCache = kwargs[CACHE]
        mask = cache.widened(attention_mask, hidden, self.index, places)
        return self.layer(hidden, *args, attention_mask=mask, **kwargs)
