"""The kinds of media, images and videos, and the inputs that carry them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.models.encoders import PIXELS
from deos_fx.models.facts import image_token_of, size_inputs, video_token_of

__all__ = [
    "IMAGES",
    "VIDEOS",
    "Kind",
    "beside",
    "encoder_inputs",
    "encoding",
    "given_kinds",
    "has_images",
    "image_inputs",
    "media",
    "token_of",
]


@dataclass(frozen=True)
class Kind:
    """A kind of media: images, or videos.

    Attributes:
        pixels: The input with their pixels.
        encode: The method of the model's core that turns them into features.
        marked: The value of ``mm_token_type_ids`` at their placeholders.
        words: Parts of the names of further inputs about them that the encoder does not take.
    """

    pixels: str
    encode: str
    marked: int
    words: tuple[str, ...] = ()


IMAGES = Kind(PIXELS[0], "get_image_features", 1)

VIDEOS = Kind(PIXELS[1], "get_video_features", 2, ("video", "second_per_grid"))


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Return whether the inputs of a call have pixels of images or videos."""
    return any(name in inputs for name in PIXELS)


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that images and videos come in: their pixels and sizes."""
    names = sorted(frozenset().union(*(beside(model, kind) for kind in given_kinds(inputs))))
    return {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}


def given_kinds(inputs: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Return the kinds that have pixels among the inputs of a call."""
    return tuple(kind for kind in (IMAGES, VIDEOS) if kind.pixels in inputs)


def token_of(model: PreTrainedModel, kind: Kind) -> int:
    """Return the id of a kind's placeholder.

    Raises:
        ValueError: If the config names none.
    """
    token = image_token_of(model) if kind is IMAGES else video_token_of(model)
    if token is None:
        raise ValueError(
            f"{kind.pixels} was given, but the config of {type(model).__name__} names no "
            "placeholder for videos (video_token_id). Give the frames as images."
        )
    return token


def media(model: PreTrainedModel, kind: Kind) -> frozenset[str]:
    """Return the names of a kind's inputs that model and encoder both take, pixels included."""
    if kind is IMAGES:
        return size_inputs(model) | {kind.pixels}
    encode = getattr(model.base_model, kind.encode, None)
    takes = frozenset() if encode is None else frozenset(inspect.signature(encode).parameters)
    return takes & frozenset(inspect.signature(type(model).forward).parameters) | {kind.pixels}


def beside(model: PreTrainedModel, kind: Kind) -> frozenset[str]:
    """Return `media` and, for videos, inputs that other parts read, such as seconds per frame."""
    names = inspect.signature(type(model).forward).parameters
    others = (name for name in names if any(word in name for word in kind.words))
    return media(model, kind) | frozenset(others)


def encoder_inputs(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the arguments of the method that encodes each kind in a call."""
    return [encoding(model, inputs, kind) for kind in given_kinds(inputs)]


def encoding(
    model: PreTrainedModel, inputs: Mapping[str, Any], kind: Kind
) -> tuple[str, dict[str, Any]]:
    """Return the core's method that encodes a kind, and its arguments in a call."""
    given = {name: inputs[name] for name in sorted(media(model, kind)) if name in inputs}
    if hasattr(model.base_model, kind.encode):
        return kind.encode, given
    # Some models encode the frames of a video as images.
    pixels = given.pop(kind.pixels)
    return IMAGES.encode, given | {IMAGES.pixels: pixels}
