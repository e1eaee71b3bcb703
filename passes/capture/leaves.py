"""Modules of ours that stand in a captured graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import masking_utils

from deos_fx.models.views import shallow_copy

__all__ = ["ImageEncoder", "MaskBuilder", "first_of"]

_PLAIN = {
    "inputs_embeds",
    "attention_mask",
    "past_key_values",
    "position_ids",
    "layer_idx",
    "allow_is_causal_skip",
}


class MaskBuilder(nn.Module):
    """One of transformers' mask functions with its config, as a node of the graph.

    It stays opaque because what it returns (None, a boolean or an additive mask) depends on the
    attention implementation and on whether anything is padded.
    """

    def __init__(self, function: Callable[..., Any], config: Any) -> None:
        super().__init__()
        self.function = function
        self.config = config

    def is_plain(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether all that matters is which token comes first and what is padding."""
        given = {name for name, value in kwargs.items() if value is not None}
        return self.function is masking_utils.create_causal_mask and given <= _PLAIN

    def keeps_apart(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether samples of one row do not see each other where position ids start again.

        Blocks of image tokens are looked up at places inside a sample, as if in the whole row.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        causal = masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask
        return self.function in causal and "position_ids" in given and given <= _PLAIN

    def forward(self, **kwargs: Any) -> Any:
        return self.function(config=self.config, **kwargs)


class ImageEncoder(nn.Module):
    """From pixels to the features that enter the prompt, as one node of the graph.

    An encoder that reads the sizes of images into Python stays opaque: another size takes another
    path through it. Features of several images come out as one tensor [T, d].
    """

    def __init__(self, core: nn.Module, encode: Callable[..., Any]) -> None:
        super().__init__()
        self.core = core
        self.encode = encode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.encode(self.core, *args, **kwargs)
        output.pooler_output = _joined(output.pooler_output)
        for name, levels in output.items():
            # DeepStack: features of several depths, each a tensor per image.
            if isinstance(levels, list) and all(map(_are_images, levels)):
                output[name] = [_joined(level) for level in levels]
        return output


def _are_images(level: Any) -> bool:
    """Whether these are features of several images, and not of images with something else."""
    return isinstance(level, tuple) and all(isinstance(part, torch.Tensor) for part in level)


def _joined(images: Any) -> Any:
    """The features of several images as one, in the structure that the model's code expects."""
    return (torch.cat(list(images)),) if isinstance(images, (list, tuple)) else images


def first_of(module: nn.Module) -> nn.Module:
    """A view of a module that returns the first of its outputs; it shares everything else."""
    kind: Any = type(module)
    view = shallow_copy(module)
    hooked = vars(view).pop("forward", None)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = hooked or functools.partial(kind.forward, self)
        return whole(*args, **kwargs)[0]

    view.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return view
