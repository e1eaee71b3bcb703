"""The kinds of media, images and videos, and the inputs that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import PIXELS

__all__ = [
    "IMAGES",
    "VIDEOS",
    "Kind",
    "beside",
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


def image_inputs(facts: ModelFacts, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that images and videos come in: their pixels and sizes."""
    names = sorted(frozenset().union(*(beside(facts, kind) for kind in given_kinds(inputs))))
    return {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}


def given_kinds(inputs: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Return the kinds that have pixels among the inputs of a call."""
    return tuple(kind for kind in (IMAGES, VIDEOS) if kind.pixels in inputs)


def token_of(facts: ModelFacts, kind: Kind) -> int:
    """Return the id of a kind's placeholder.

    Raises:
        ValueError: If the config names none.
    """
    token = facts.image_token if kind is IMAGES else facts.video_token
    if token is None:
        raise ValueError(
            f"{kind.pixels} was given, but the config of {facts.name} names no "
            "placeholder for videos (video_token_id). Give the frames as images."
        )
    return token


def media(facts: ModelFacts, kind: Kind) -> frozenset[str]:
    """Return the names of a kind's inputs that model and encoder both take, pixels included."""
    if kind is IMAGES:
        return facts.size_inputs | {kind.pixels}
    takes = facts.encoders.get(kind.encode, frozenset())
    return takes.intersection(facts.arguments.parameters) | {kind.pixels}


def beside(facts: ModelFacts, kind: Kind) -> frozenset[str]:
    """Return `media` and, for videos, inputs that other parts read, such as seconds per frame."""
    names = facts.arguments.parameters
    others = (name for name in names if any(word in name for word in kind.words))
    return media(facts, kind) | frozenset(others)


def encoding(
    facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind
) -> tuple[str, dict[str, Any]]:
    """Return the core's method that encodes a kind, and its arguments in a call."""
    given = {name: inputs[name] for name in sorted(media(facts, kind)) if name in inputs}
    if kind.encode in facts.encoders:
        return kind.encode, given
    # Some models encode the frames of a video as images.
    pixels = given.pop(kind.pixels)
    return IMAGES.encode, given | {IMAGES.pixels: pixels}
