"""Let images enter a model at a scale: the processor that goes with a policy's ``image_scale``.

A processor decides how many pixels of an image enter, and there are two kinds.

1. Some cut every image into as many tiles, whatever its size (SmolVLM, InternVL). Their own setting
   is scaled: the size that an image is brought to first, or the largest number of tiles.
2. Others take an image at its own size, within limits (Qwen-VL, Pixtral), or choose tiles by it
   (LLaVA-NeXT). The image itself is resized before they read it.

Which kind a processor is shows when both are tried on an image.

A model may also take one size of images and its processors know no tiles (LLaVA-1.5). Then no scale
has an effect, which the model alone tells.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image
from transformers.image_utils import load_image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from deos_fx.data.batches import batches
from deos_fx.data.record import Record
from deos_fx.recent import Recent

__all__ = ["check_scale", "scaled_processor"]

# An image to try a processor on. Tiles are mostly chosen by its proportions.
_PROBE = (896, 672)

# Halvings of the side of an image: the last is far below the side of a patch.
_HALVINGS = 10

# Shorter sides are not tried: processors cannot tell rows of pixels from channels then.
_SHORTEST = 16

# Sizes of images whose factors are kept.
_SIZES = 4096

# Settings of image processors that cut an image into tiles: InternVL, Gemma 3, Aria.
_TILES = frozenset({"max_patches", "pan_and_scan_max_num_crops", "split_image"})


def check_scale(scale: float, model_type: str, visual_tokens: int) -> None:
    """Refuse a scale that can change nothing, as far as a model alone tells.

    Args:
        scale: Linear scale in (0, 1].
        model_type: The kind of model, as its config has it.
        visual_tokens: How many it makes of every image; 0 if that depends on the image's size.

    Raises:
        ValueError: If images of the model have one size, and image processors of its kind do not
            cut them into tiles.
    """
    if scale == 1 or not visual_tokens:
        return
    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    kinds = [_settings_of(name) for name in named.values()]
    if kinds and all(settings and _TILES.isdisjoint(settings) for settings in kinds):
        raise ValueError(
            f"image_scale={scale:g} changes nothing: a {model_type} model takes one size of "
            f"images, of which it makes {visual_tokens} visual tokens. Leave it out, or keep "
            "fewer visual tokens."
        )


def _settings_of(image_processor: str) -> frozenset[str]:
    """Return the names of the settings of a class of image processors; none if it is not there."""
    try:
        kind = getattr(importlib.import_module("transformers"), image_processor)
        return frozenset(kind.valid_kwargs.__annotations__)
    except (AttributeError, ImportError):
        # Case: it needs a package that is not installed, or is of an older make.
        return frozenset()


def scaled_processor(processor: Any, scale: float) -> Any:
    """Return a processor that lets images enter at a scale.

    An image enters with its sides scaled, in relation to the size at which the processor would let
    it enter otherwise, and with at most ``scale**2`` of its pixels. Where a processor cuts images
    into tiles, it is their number that shrinks, in whole tiles, and a tile that shows the whole
    image stays. An image that the processor enlarges is left as it is. Videos are not scaled.

    The result is used like the processor. What it saves is the unscaled processor, since the scale
    is a part of the policy; and a processor that is scaled already is scaled anew, so that a scale
    is never applied twice. It may be pickled, for workers that load data.

    Args:
        processor: The processor of a model; it is not changed.
        scale: Linear scale in (0, 1].

    Returns:
        The processor; with a scale of 1, the unscaled one.

    Raises:
        ValueError: If the scale is out of range, or changes nothing for this processor.
    """
    # Also false for NaN.
    if not 0 < scale <= 1:
        raise ValueError(f"the scale of images is {scale!r}; give a number in (0, 1]")
    whole = getattr(type(processor), "unscaled", processor)
    if scale == 1:
        return whole
    # Tiles may follow the size of an image up to their largest number (Llama 4): what shrinks more.
    found, fewest = None, _pixels_of_probe(whole)
    for image_processor in _ways(whole.image_processor, scale):
        made = _in_place_of(whole, {"__reduce__": _made_again(scale)})
        made.image_processor = image_processor
        pixels = _pixels_of_probe(made)
        if pixels < fewest:
            found, fewest = made, pixels
    if found is not None:
        return found
    raise ValueError(
        f"image_scale={scale:g} changes nothing: {type(whole).__name__} makes as many visual "
        "tokens of an image as without it. Leave it out where a model takes one size of images; "
        "where images are cut into tiles (SmolVLM, InternVL), choose a smaller scale."
    )


def _ways(image_processor: Any, scale: float) -> Iterator[Any]:
    """Yield an image processor with scaled settings, if it has any, and one that resizes images."""
    settings = _scaled_settings(image_processor, scale)
    if settings:
        made = _in_place_of(image_processor, {})
        vars(made).update(settings)
        yield made
    resizing = _Resizing(image_processor, scale)

    def preprocess(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        smaller = _each(images, lambda image: resizing(image, options))
        return image_processor.preprocess(smaller, *args, **options)

    yield _in_place_of(image_processor, {"preprocess": preprocess})


def _in_place_of(original: Any, members: Mapping[str, Any]) -> Any:
    """Make a copy of a processor with some methods replaced, which saves the original."""

    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        return original.save_pretrained(*args, **options)

    made = copy.copy(original)
    # A subclass, so that everything else stays the processor's own.
    own = {"unscaled": original, "save_pretrained": save_pretrained, **members}
    made.__class__ = type(f"Scaled{type(original).__name__}", (type(original),), own)
    return made


def _made_again(scale: float) -> Callable[[Any], tuple[Any, ...]]:
    """Return how a scaled processor is pickled and copied: its class has no name to be found by."""

    def reduce(self: Any) -> tuple[Any, ...]:
        own = {name: value for name, value in vars(self).items() if name != "image_processor"}
        return scaled_processor, (type(self).unscaled, scale), own

    return reduce


# *** settings ***


def _scaled_settings(image_processor: Any, scale: float) -> dict[str, Any]:
    """Return the settings of a processor that cuts every image into tiles, scaled."""
    settings: dict[str, Any] = {}
    longest = _longest_edge(image_processor, "size")
    tile = _longest_edge(image_processor, "max_image_size")
    if longest and tile:
        # Case: images are brought to one size, and cut into tiles of another (SmolVLM).
        settings["size"] = copy.copy(image_processor.size)
        settings["size"]["longest_edge"] = max(tile, round(scale * longest))
    most = getattr(image_processor, "max_patches", None)
    if most:
        # Case: so many tiles at most, in the proportions of the image (InternVL).
        fewest = getattr(image_processor, "min_patches", None) or 1
        settings["max_patches"] = max(fewest, math.floor(scale**2 * most))
    return settings


def _longest_edge(image_processor: Any, name: str) -> int | None:
    """Return the longest edge of a size among the settings, if there is one."""
    size: Any = getattr(image_processor, name, None)
    # The size may be a number in its place (Aria).
    return size.get("longest_edge") if hasattr(size, "get") else None


# *** images ***


class _Resizing:
    """Resizes images so far that a scaled number of pixels enters.

    Args:
        image_processor: The unscaled image processor.
        scale: The linear scale.
    """

    def __init__(self, image_processor: Any, scale: float) -> None:
        self._measured = image_processor
        self._scale = scale
        self._factors: Recent[tuple[tuple[int, int], str], float] = Recent(_SIZES)

    def __call__(self, image: Image.Image, options: Mapping[str, Any]) -> Image.Image:
        """Return an image of a smaller size.

        Args:
            image: The image.
            options: Of the call of the image processor.
        """
        key = (image.size, repr(options))
        factor = self._factors.find(key, lambda: self._factor(image.size, options))
        return image if factor == 1 else _resized(image, factor)

    def _factor(self, size: tuple[int, int], options: Mapping[str, Any]) -> float:
        """Return how far the sides of an image are scaled.

        That is the scale, unless more pixels would enter than it says: because the processor's own
        limit is lower than the size of the image, or because it rounds up.
        """

        def entering(factor: float) -> int:
            blank = Image.new("RGB", _times(size, factor))
            made = self._measured.preprocess(blank, **{**options, "return_tensors": "pt"})
            return _pixels(made)

        least = min(self._scale, _SHORTEST / min(size))
        whole, fewest = entering(1), entering(least)
        limit = max(self._scale**2 * whole * (1 + 1e-9), fewest)
        if whole <= limit:
            # Case: so small that the processor enlarges it.
            return 1
        if entering(self._scale) <= limit:
            return self._scale
        # Pixels grow with the side, so bisection finds the largest that is within the limit.
        low, high = least, self._scale
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if entering(middle) <= limit:
                low = middle
            else:
                high = middle
        return low


def _resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize(_times(image.size, factor), Image.Resampling.BICUBIC)


def _times(size: tuple[int, int], factor: float) -> tuple[int, int]:
    width, height = (max(1, round(factor * side)) for side in size)
    return width, height


def _each(images: Any, change: Callable[[Image.Image], Image.Image]) -> Any:
    """Change images in lists of any depth."""
    if isinstance(images, (list, tuple)):
        return [_each(image, change) for image in images]
    if isinstance(images, (Image.Image, str)):
        return change(load_image(images))
    raise TypeError(
        f"an image is a {type(images).__name__}, whose size is not changed; give a PIL image, a "
        "path or a URL, or call the unscaled processor"
    )


def _pixels(inputs: Mapping[str, Any]) -> int:
    """Count the values of pixels that enter, without padding."""
    mask = inputs.get("pixel_attention_mask")
    return inputs["pixel_values"].numel() if mask is None else int(mask.sum())


def _pixels_of_probe(processor: Any) -> int:
    """Count the pixels of an image as they enter through the whole processor."""
    record = Record(Image.new("RGB", _PROBE), "What is shown here?")
    (inputs,) = batches(processor, [record], 1)
    if "pixel_values" not in inputs:
        raise ValueError(
            f"{type(processor).__name__} makes {', '.join(inputs)} of an image and no "
            "pixel_values, so how many pixels enter is not known; leave image_scale out"
        )
    return _pixels(inputs)
