"""Open images: of known formats and bounded size, upright, as three channels of 8 bits."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from deos_fx.data.record import ImageSource

__all__ = ["FORMATS", "MAX_PIXELS", "image_name", "open_image"]

MAX_PIXELS = 64_000_000
"""Pixels of the largest image that is decoded, which takes up to 750 MB while it is."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are opened. Pillow knows others, some of which start further programs (EPS)."""

# Tags of a TIFF file.
_BITS, _PHOTOMETRIC = 258, 262


def open_image(source: ImageSource, where: str = "") -> Image.Image:
    """Load the pixels as transformers' `load_image` does: upright, three channels of 8 bits.

    Args:
        source: The file, its contents, or an image that is loaded already.
        where: What names it, for messages: a file and a line.

    Raises:
        ValueError: If it is of another format, has too many pixels, is damaged, or the range of its
            values is not known.
    """
    name = image_name(source, where)
    # Decoders of damaged files raise nearly anything: SyntaxError, struct.error, IndexError, ...
    try:
        if isinstance(source, Image.Image):
            return _pixels(source)
        with _opened(source) as image:
            return _pixels(image)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} is not an image that can be read: {reason}") from error


def image_name(source: ImageSource, where: str = "") -> str:
    """Return what an image is called in messages."""
    name = str(source) if isinstance(source, Path) else "an image"
    return f"{where}: {name}" if where else name


def _opened(source: Path | bytes) -> Image.Image:
    """Read the head of a file; nothing is decoded yet."""
    if isinstance(source, Path) and source.exists() and not source.is_file():
        # Whoever opens a pipe may wait for ever.
        raise ValueError("it is a folder, a device or a pipe")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Pillow warns of sizes that are refused anyway.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}, or damaged") from None


def _pixels(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width} x {height} pixels, and at most {MAX_PIXELS:,} are decoded; make it "
            "smaller"
        )
    if image.mode.startswith("I;16"):
        return load_image(Image.fromarray(_eight_bits(image)))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of mode {image.mode}, whose range is not known; save it with 8 or 16 "
            "bits a channel"
        )
    return load_image(image)


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return the upper 8 bits of grey values of up to 16, upright.

    `load_image` would cut values off at 255, which makes nearly everything white.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16) >> (bits - 8)
    # In a TIFF file 0 may be white, which Pillow takes into account for 8 bits alone.
    return (255 - values if tags.get(_PHOTOMETRIC) == 0 else values).astype(np.uint8)
