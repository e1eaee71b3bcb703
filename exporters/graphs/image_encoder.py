"""Build the graph of the image encoder and the constants that it is valid for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deos_fx.exporters.graphs.exportable import Exportable
from deos_fx.exporters.graphs.record import record

__all__ = ["encoder_graph"]


class _Encoder(nn.Module):
    """The recorded image encoder, for the images of one prompt."""

    def __init__(self, recorded: fx.GraphModule) -> None:
        super().__init__()
        self.recorded = recorded

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Encode the images of one prompt; return ``image_features_i`` and ``read_i``."""
        parts = zip(("image_features", "read"), self.recorded(pixel_values), strict=True)
        return {f"{part}_{i}": value for part, values in parts for i, value in enumerate(values)}


def encoder_graph(
    encode: fx.GraphModule, images: Mapping[str, Tensor]
) -> tuple[Exportable, dict[str, Tensor]]:
    """Record the encoder of one prompt's images.

    Args:
        encode: The encoder that `split_encoder` took out of the prefill graph.
        images: The images of one prompt: ``pixel_values`` and the inputs with their sizes.

    Returns:
        The graph from ``pixel_values`` to ``image_features_i`` and ``read_i``, and the values it
        holds for: the sizes by name, and ``read_i``, what the encoder read of the pixels.
    """
    pixels = images["pixel_values"]
    sizes = {name: value for name, value in images.items() if name != "pixel_values"}
    recorded = record(
        lambda pixels: pytree.tree_leaves(encode(pixel_values=pixels, **sizes)), pixels
    )
    _, reads = recorded(pixels)
    constants = sizes | {f"read_{i}": value for i, value in enumerate(reads)}
    # Copies with memory of their own: safetensors refuses tensors that share memory.
    constants = {name: value.cpu().clone() for name, value in constants.items()}
    given = {"pixel_values": pixels}
    return Exportable(_Encoder(recorded), given, {"pixel_values": {}}), constants
