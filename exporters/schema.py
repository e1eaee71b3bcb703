"""The schemas of the manifests of exports."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from deos_fx.models.families import IN_FRONT
from deos_fx.policy.schema import ModelEntry
from deos_fx.schema import Count, Recorded, Strict, Text
from deos_fx.words import counted

__all__ = ["GenaiFile", "ManifestFile"]

Graph = Literal["prefill", "decode", "extend", "image_encoder"]
"""The name of a graph, which is a file in the same folder: ``<name>.onnx``."""
# Those that every export has.
_ALWAYS = ["prefill", "decode", "extend"]


Shape: TypeAlias = Annotated[list[Annotated[Count, Field(ge=1)]], Field(min_length=1, max_length=8)]
"""Lengths of the axes of a tensor."""


class SpaceEntry(Strict):
    """The decoder layers after one reduction."""

    first_layer: Count
    position: Literal["keep", "compact", "grid"]
    biased: bool
    """Whether its keys carry a mass bias."""
    dropped: Count
    """Visual tokens of a prompt that its layers do not get."""


class ImageEntry(Strict):
    """An image of a prompt."""

    placeholders: Annotated[int, Field(ge=1, le=10**9)]
    left: Count


class GenaiFile(Recorded):
    """What the prompts of an export for onnxruntime-genai are like."""

    deos_fx: Literal["genai"]
    version: Literal[1]
    packages: dict[Text, Text]
    image_token: Count
    pixels: Shape
    """The shape of a prompt's pixels."""
    images: Annotated[list[ImageEntry], Field(min_length=1, max_length=10**6)]
    """Of a prompt, in order."""


class ManifestFile(Recorded):
    """What a runtime has to know of the graphs of an export, and the versions that made them."""

    deos_fx: Literal["onnx"]
    version: Literal[4]
    packages: dict[Text, Text]
    opset: Count
    model: ModelEntry
    device: Literal["cpu", "cuda"]
    """Where its operators are fast."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    weights: Literal["int8", "int4"] | None = None
    """What matrices of weights were rounded to."""
    graphs: Annotated[list[Graph], Field(min_length=3, max_length=4)]
    inputs: Annotated[list[Text], Field(min_length=1, max_length=100)]
    """What a call may have, though a graph may not read all of it."""
    image_token: Annotated[int, Field(ge=IN_FRONT, le=2**31 - 1)]
    """Negative where the model puts images in front of the text itself."""
    images: Annotated[int, Field(ge=1, le=10**6)]
    """Of a prompt."""
    image_tokens: Annotated[int, Field(ge=1, le=10**9)]
    """Placeholders of a prompt."""
    ends_in_image: bool | None
    """None where the graphs take both kinds of prompts."""
    pixels: Shape
    """The shape of a prompt's pixels."""
    further_pixels: Annotated[dict[Text, Shape], Field(max_length=10)] = {}
    """The shapes of other inputs with pixels of the same images."""
    guards: Annotated[list[bool | float], Field(max_length=1000)] = []
    """What each output ``guard_i`` of the prefill has to be."""
    coordinates: Annotated[int, Field(ge=0, le=8)]
    """Of a position: time, row and column; 0 where a position is one number."""
    elastic: Annotated[list[Count], Field(min_length=1, max_length=10**6)] | None = None
    """Visual tokens of each image of a prompt, if the counts of the reductions are inputs."""
    spaces: Annotated[list[SpaceEntry], Field(max_length=1000)]

    @model_validator(mode="after")
    def _goes_together(self) -> ManifestFile:
        if {*_ALWAYS} - {*self.graphs} or len({*self.graphs}) < len(self.graphs):
            raise ValueError(f"graphs is {self.graphs}; it should name each of {_ALWAYS} once")
        if "input_ids" not in self.inputs or len({*self.inputs}) < len(self.inputs):
            raise ValueError(f"inputs is {self.inputs}; it should name each once, and input_ids")
        for one, other in pairwise(self.spaces):
            if other.first_layer < one.first_layer or other.dropped < one.dropped:
                raise ValueError("spaces should begin at ever later layers, with ever fewer tokens")
        for space in self.spaces:
            if space.dropped >= self.image_tokens or space.first_layer > self.model.decoder_layers:
                raise ValueError(
                    f"spaces has a space from layer {space.first_layer} on without "
                    f"{counted(space.dropped, 'token')}, but of layers there are "
                    f"{self.model.decoder_layers}, and of image tokens {self.image_tokens}"
                )
        return self
