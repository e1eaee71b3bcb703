"""Lend transformers' own `generate` to something that is not the model itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

__all__ = ["generation_host"]


def generation_host(
    call: Callable[..., ModelOutput], model: PreTrainedModel, device: torch.device | None = None
) -> Any:
    """A view of a model whose forward is another callable, so that `generate` is transformers'.

    It shares all weights and configs with the model and is of a subclass of the model's class.

    Args:
        call: Takes the arguments of the model's forward.
        model: The model; its weights are not used and may be on the meta device.
        device: Where `call` wants its inputs, if that is not where the model is.

    Returns:
        The host; the model is left as it is.
    """

    original: Any = type(model)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput:
        return call(*args, **kwargs)

    def keep_pixels(self: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        # transformers would encode the images before the prefill; here that is the graph's part.
        return model_kwargs

    def expand(
        self: Any, expand_size: int = 1, *args: Any, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        # For beams, transformers repeats row by row; the images of a prompt have to stay together.
        pixels = kwargs.pop("pixel_values", None)
        ids, kwargs = original._expand_inputs_for_generation(
            self, expand_size, *args, input_ids=input_ids, **kwargs
        )
        if pixels is not None:
            images = max(1, len(pixels) // len(input_ids))
            prompts = pixels.split(images)
            kwargs["pixel_values"] = torch.cat(
                [prompt for prompt in prompts for _ in range(expand_size)]
            )
        return ids, kwargs

    replaced: dict[str, Any] = {
        "forward": forward,
        "_prepare_multimodal_encoder_kwargs_for_generation": keep_pixels,
        "_expand_inputs_for_generation": expand,
    }
    if device is not None:
        replaced["device"] = device
    host = copy.copy(model)
    host.__class__ = type(f"Reduced{type(model).__name__}", (type(model),), replaced)
    return host
