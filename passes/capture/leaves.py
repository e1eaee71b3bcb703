"""Modules and functions of this package that are nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedConfig, masking_utils

from deos_fx.errors import GuardError
from deos_fx.models.upstream import CACHE
from deos_fx.models.views import with_forward

__all__ = ["ImageEncoder", "MaskBuilder", "check_guard", "first_of"]

# Arguments of a mask function that add nothing to a causal mask with padding.
_PLAIN = {
    "inputs_embeds",
    "attention_mask",
    CACHE,
    "position_ids",
    "layer_idx",
    "allow_is_causal_skip",
}


@fx.node.has_side_effect
def check_guard(value: object, expected: object) -> None:
    """Raise `GuardError` unless ``value`` is what the captured run saw.

    Args:
        value: Result of a recorded comparison or length.
        expected: Its value during capture.

    Raises:
        GuardError: If the two differ.
    """
    if isinstance(expected, bool):
        # Comparisons of symbolic sizes are no bools, and cannot be compared with one.
        value = bool(value)
    if value != expected:
        raise GuardError(f"captured for {expected!r}, called with {value!r}")


class MaskBuilder(nn.Module):
    """One of transformers' mask functions with its config, as a node of the graph.

    It stays opaque because its result (None, a boolean or an additive mask) depends on the
    attention implementation and on whether anything is padded.

    Args:
        function: The mask function.
        config: The config that it is called with.
        own: Whether it is a method of the model instead, which is given the length of a cache.

    Attributes:
        always: Whether flags [B, N] are made where there is no padding either, as some models do
            before they compute with these.
    """

    def __init__(
        self, function: Callable[..., Any], config: PreTrainedConfig, own: bool = False
    ) -> None:
        super().__init__()
        self.function = function
        self.config = config
        self.own = own
        self.always = False

    @property
    def is_of_padding(self) -> bool:
        """Return whether the function makes flags [B, N] of the new tokens that are no padding."""
        return self.function.__name__ == "create_recurrent_attention_mask"

    def is_plain(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether nothing matters but the order of the tokens and padding.

        Args:
            kwargs: Arguments of the call.
        """
        # Any further argument, such as a mask function to combine with, changes what tokens see.
        given = {name for name, value in kwargs.items() if value is not None}
        return self.function is masking_utils.create_causal_mask and given <= _PLAIN

    def keeps_apart(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether the samples of a row, told apart by position ids, do not see each other.

        Masks with blocks of image tokens do not keep samples apart: their function takes a place
        inside a sample for a place in the row.

        Args:
            kwargs: Arguments of the call.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        # These two look for borders in the position ids.
        causal = masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask
        return self.function in causal and "position_ids" in given and given <= _PLAIN

    def forward(self, **kwargs: Any) -> Any:
        """Make the mask, or the dict of masks by kind of layer."""
        mask = self.function(config=self.config, **kwargs)
        if mask is None and self.always:
            hidden = kwargs["inputs_embeds"]
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return mask


class ImageEncoder(nn.Module):
    """The image encoder, from pixels to the features that enter the prompt, as one node.

    An encoder that reads the sizes of images into Python stays opaque: another size takes another
    path through it. Features of several images come out as one tensor [T, d].

    Args:
        core: The base model that has the method.
        encode: The method that encodes, such as ``get_image_features``.
    """

    def __init__(self, core: nn.Module, encode: Callable[..., Any]) -> None:
        super().__init__()
        self.core = core
        self.encode = encode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Encode the images, and join the features of several images to one tensor."""
        output = self.encode(self.core, *args, **kwargs)
        # One tensor [T, d] for all images: a graph has no list of dynamic length.
        output.pooler_output = _joined(output.pooler_output)
        for name, levels in output.items():
            # Case: DeepStack has features of several depths, at each depth a tensor per image, and
            # perhaps the layer that they are for.
            if isinstance(levels, list) and all(map(_are_images, levels)):
                output[name] = [_joined(level) for level in levels]
            elif isinstance(levels, list) and all(map(_are_for_a_layer, levels)):
                output[name] = [(layer, _joined(images)) for layer, images in levels]
        return output


def _are_images(level: object) -> bool:
    """Return whether a value is a tuple of tensors and nothing else: one tensor for each image."""
    return isinstance(level, tuple) and all(isinstance(part, torch.Tensor) for part in level)


def _are_for_a_layer(level: object) -> bool:
    """Return whether a value is the number of a layer and tensors, one for each image."""
    match level:
        case (int(), (list() | tuple()) as images):
            return _are_images(tuple(images))
    return False


def _joined(images: Any) -> Any:
    """Join the features of several images, in the structure that the model's code expects."""
    return (torch.cat(list(images)),) if isinstance(images, (list, tuple)) else images


def first_of(module: nn.Module) -> nn.Module:
    """Make a view of a module that returns only its first output; everything else is shared."""
    return with_forward(module, lambda forward, *args, **kwargs: forward(*args, **kwargs)[0])
