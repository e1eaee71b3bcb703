"""The graph of the image encoder, and its constants."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deos_fx.exporters.graphs.exportable import Exportable
from deos_fx.exporters.graphs.record import record

__all__ = ["encoder_graph"]


class _Encoder(nn.Module):
    """The image encoder of one prompt, recorded."""

    def __init__(self, recorded: fx.GraphModule) -> None:
        super().__init__()
        self.recorded = recorded

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        parts = zip(("image_features", "read"), self.recorded(pixel_values), strict=True)
        return {f"{part}_{i}": value for part, values in parts for i, value in enumerate(values)}


def encoder_graph(
    encode: fx.GraphModule, images: Mapping[str, Tensor]
) -> tuple[Exportable, dict[str, Tensor]]:
    """The encoder of one prompt's images, and what it is constant for."""
    pixels = images["pixel_values"]
    sizes = {name: value for name, value in images.items() if name != "pixel_values"}
    recorded = record(
        lambda pixels: pytree.tree_leaves(encode(pixel_values=pixels, **sizes)), pixels
    )
    _, reads = recorded(pixels)
    constants = sizes | {f"read_{i}": value for i, value in enumerate(reads)}
    # Of their own memory: the file does not take parts of other tensors.
    constants = {name: value.cpu().clone() for name, value in constants.items()}
    given = {"pixel_values": pixels}
    return Exportable(_Encoder(recorded), given, {"pixel_values": {}}), constants
