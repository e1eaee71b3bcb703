"""The prompts that the graphs of an export are for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from deos_fx.exporters.manifest import AGAIN
from deos_fx.exporters.session import as_tensor
from deos_fx.inputs.batch import from_first_patch
from deos_fx.inputs.packed import packed_by
from deos_fx.models.families import PATCH_NUMBERS
from deos_fx.tokens.positions import last_token
from deos_fx.words import counted

__all__ = ["ExportedPrompts"]


class ExportedPrompts:
    """What prompts have to be like, so that the prefill graph is right for them.

    Args:
        manifest: The manifest of the export.
        constants: What the image encoder was exported with: sizes of images, values of the pixels.
        read: Names of the inputs that the prefill graph reads.
    """

    def __init__(
        self, manifest: Mapping[str, Any], constants: Mapping[str, Tensor], read: Collection[str]
    ) -> None:
        self._manifest = manifest
        self._constants = constants
        self._read = read

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuse prompts whose images are not those that the graphs were exported for.

        Args:
            inputs: Inputs of a prefill, with ``input_ids`` [B, N].

        Raises:
            ValueError: If they do not fit the graphs; the message says what does.
        """
        manifest, ids = self._manifest, inputs["input_ids"]
        # Numbers of image tokens, without duplicates.
        counts = sorted({*(ids == manifest["image_token"]).sum(dim=1).tolist()})
        if "pixel_values" not in inputs or counts[-1] == 0:
            self.refuse_half()
        # In this order, so that the first message names the most basic difference.
        if counts != [manifest["image_tokens"]]:
            images = counted(manifest["images"], "image")
            raise ValueError(
                f"The prompts have {counts} image tokens each, but this model was exported for "
                f"prompts with {manifest['image_tokens']} ({images}). {AGAIN}"
            )
        _check_mask(inputs, ids == manifest["image_token"])
        self._check_ends(inputs)
        self._check_inputs(inputs)
        # Pixels have rows for the images of one prompt, times the number of prompts.
        pixels = {"pixel_values": manifest["pixels"], **manifest["further_pixels"]}
        for name, own in pixels.items():
            shape = tuple(inputs[name].shape)
            if shape != (own[0] * len(ids), *own[1:]):
                raise ValueError(
                    f"{name} of {counted(len(ids), 'prompt')} has the shape {shape}, but this "
                    f"model was exported for {tuple(own)} per prompt. Use the processor of the "
                    f"model. {AGAIN}"
                )
        # Inputs with the sizes of images are constants of the graphs.
        for name in self._constants.keys() & set(manifest["inputs"]):
            expected, given = torch.cat([self._constants[name]] * len(ids)), inputs[name]
            if name in PATCH_NUMBERS and len(given) == len(expected):
                # Case: numbers that go on through the prompts.
                given = torch.cat([*map(from_first_patch, given.chunk(len(ids)))])
            if not torch.equal(given, expected.to(given.dtype)):
                raise ValueError(
                    f"{name} is {_shown(inputs[name])}, but this model was exported for images "
                    f"with {_shown(self._constants[name])} in every prompt. {AGAIN}"
                )

    def check_branches(self, outputs: Mapping[str, Any]) -> None:
        """Refuse prompts for which the model takes other branches than those in the graphs.

        Args:
            outputs: What the prefill graph returned for them.

        Raises:
            ValueError: If it does.
        """
        for i, expected in enumerate(self._manifest["guards"]):
            if as_tensor(outputs[f"guard_{i}"]).item() != expected:
                raise ValueError(
                    "This model computes another way for these prompts than for those it was "
                    "exported for, where its code asks whether they have tokens of some kind. "
                    f"{AGAIN}"
                )

    def refuse_half(self) -> NoReturn:
        """Refuse placeholders without pixels, and pixels without placeholders.

        Raises:
            ValueError: Always.
        """
        manifest = self._manifest
        raise ValueError(
            "The prompt has no image, or no place for it, but this model was exported for prompts "
            f"with {manifest['images']}: pass pixel_values, and input_ids with image placeholders "
            f"(token id {manifest['image_token']}); or neither, for a text without images."
        )

    def _check_ends(self, inputs: Mapping[str, Any]) -> None:
        """Refuse prompts that end in an image if the graphs were exported for text at the end.

        Refuse them also the other way round: graphs for an image at the end always keep its last
        token, and others may drop it.
        """
        ends = self._manifest.get("ends_in_image")
        ids = inputs["input_ids"]
        # The last token that is no padding.
        last = ids.gather(1, last_token(ids, inputs.get("attention_mask")))
        if ends is not None and bool(((last == self._manifest["image_token"]) != ends).any()):
            one, other = ("text", "an image") if ends else ("an image", "text")
            raise ValueError(
                f"There are prompts that end in {one}, but this model was exported for prompts "
                f"that end in {other}. {AGAIN}"
            )

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs that the graphs do not take, and calls that lack inputs they need."""
        names = set(self._manifest["inputs"])
        given = {name for name, value in inputs.items() if isinstance(value, Tensor)}
        # The mask may be left out; it is all ones then.
        needed = names & (set(self._read) | self._constants.keys()) - {"attention_mask"}
        for what, wrong in (("has", given - names), ("lacks", needed - given)):
            if wrong:
                raise ValueError(
                    f"The call {what} {', '.join(sorted(wrong))}, but this model was exported for "
                    f"{', '.join(sorted(names))}. {AGAIN}"
                )


def _check_mask(inputs: Mapping[str, Any], visual: Tensor) -> None:
    """Refuse masks with an axis for queries, and packed samples: a row must be one prompt.

    Raises:
        ValueError: If a row may hold several samples.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        # Case: a mask of queries and keys.
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, but exported graphs take flags of real tokens "
            "[B, N]. Give every prompt a row of its own."
        )
    # With the cache that every call has here, it refuses positions that go back.
    packed_by(inputs, visual)


def _shown(tensor: Tensor) -> str:
    """Return a tensor's values if they are few, else its shape, for an error message."""
    return str(tensor.tolist()) if tensor.numel() <= 16 else f"of shape {tuple(tensor.shape)}"
