"""Return images as a model is given them: resized, cropped and cut into tiles."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["frames"]


def frames(
    processor: Any, inputs: Mapping[str, Tensor], images: Sequence[Image.Image]
) -> list[Image.Image]:
    """Return the images of a prompt as its visual tokens lie on them.

    Args:
        processor: The processor.
        inputs: What it made of one prompt.
        images: The prompt's images, upright.

    Returns:
        The pixels that went in, a tile of an image as an image of its own. Where the model puts
        the tiles together again (LLaVA-NeXT), the whole image as it went in, and the image itself.
        Where the processor flattens patches, nothing was cropped, and the images are returned.
    """
    pixels = next(value for name, value in inputs.items() if name.endswith("pixel_values"))
    if pixels.ndim < 4:
        return list(images)
    # Only a model that puts tiles together is told the size of the image that they are of.
    if pixels.ndim == 5 and "image_sizes" in inputs:
        whole = _pictures(processor, pixels[:, 0])
        both = zip(whole, images, strict=True) if pixels.shape[1] > 1 else zip(whole, strict=True)
        return [*itertools.chain(*both)]
    return _pictures(processor, pixels)


def _pictures(processor: Any, pixels: Tensor) -> list[Image.Image]:
    """Turn pixels [..., 3, H, W] as a processor makes them into images."""
    channels = pixels.flatten(0, -4).float().cpu().movedim(1, -1).numpy()
    settings = processor.image_processor
    if settings.do_normalize:
        channels = channels * settings.image_std + settings.image_mean
    # Processors scale values of 8 bits to the range from 0 to 1.
    eight_bits = np.clip(255 * channels, 0, 255).round().astype(np.uint8)
    return [Image.fromarray(frame) for frame in eight_bits]
