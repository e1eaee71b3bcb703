"""Resize images until they have few visual tokens: what a user can do without any reduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from deos_fx.data import Record, batches, open_image
from deos_fx.models.facts import ModelFacts

__all__ = ["shrunk"]

# Halvings of the side of an image: the last is far below the side of a patch.
_HALVINGS = 10


def shrunk(
    facts: ModelFacts, processor: Any, records: Sequence[Record], share: float
) -> list[Record]:
    """Resize the images of records, each to the largest size within a share of its visual tokens.

    Args:
        facts: The facts of the model.
        processor: Its processor.
        records: The records.
        share: The share of each image's own visual tokens that may be left.

    Returns:
        The records with smaller images.

    Raises:
        ValueError: If the model gives all images equally many tokens, or the processor makes more
            of the smallest image.
    """
    if not facts.sizes_vary:
        raise ValueError(
            f"every image of a {facts.signature.model_type} model becomes "
            f"{facts.signature.visual_tokens} visual tokens, whatever its size"
        )
    return [_shrunk(facts, processor, record, share) for record in records]


def _shrunk(facts: ModelFacts, processor: Any, record: Record, share: float) -> Record:
    images = [open_image(source, record.where) for source in record.images]
    limit = share * _tokens(facts, processor, record, images)
    # Tokens grow with the side, so bisection finds the largest that is within the limit.
    best, low, high = None, 0.0, 1.0
    for _ in range(_HALVINGS):
        side = (low + high) / 2
        smaller = [_resized(image, side) for image in images]
        if _tokens(facts, processor, record, smaller) <= limit + 1e-9:
            best, low = smaller, side
        else:
            high = side
    if best is None:
        raise ValueError(
            f"the processor makes more than {limit:.4g} visual tokens of an image of any size"
        )
    return replace(record, image=best)


def _resized(image: Image.Image, side: float) -> Image.Image:
    width, height = (max(1, round(side * length)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _tokens(
    facts: ModelFacts, processor: Any, record: Record, images: Sequence[Image.Image]
) -> int:
    """Count the visual tokens of a record with other images."""
    (inputs,) = batches(processor, [replace(record, image=images, answer=None)], 1)
    return int((inputs["input_ids"] == facts.image_token).sum())
