"""Check the inputs of a call and fill in what the model would make up by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from deos_fx.cache import ReducedCache
from deos_fx.passes.layout import PromptLayout
from deos_fx.signature import grid_of

__all__ = ["complete_inputs", "prompt_layout"]


def complete_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with everything explicit that the model's forward would default.

    Args:
        model: The model.
        inputs: Arguments of its forward, without those that are None.

    Returns:
        The inputs with position ids and, unless ``use_cache`` is False, a cache.

    Raises:
        ValueError: If ``input_ids`` is missing, the cache is not a `ReducedCache` or has its images
            already, or something is asked for that a reduced model does not have.
    """
    inputs = dict(inputs)
    if "input_ids" not in inputs:
        raise ValueError(
            "deos_fx finds the visual tokens by input_ids, which is missing: pass input_ids with "
            "image placeholders and pixel_values, not inputs_embeds."
        )
    config = model.config.get_text_config()
    cache = inputs.get("past_key_values")
    if cache is None and inputs.setdefault("use_cache", config.use_cache):
        cache = inputs["past_key_values"] = ReducedCache(config)
    if cache is not None and not isinstance(cache, ReducedCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: the layers of a reduced model hold "
            "different numbers of tokens. Pass None, or the cache an earlier call returned."
        )
    if cache is not None and cache.get_seq_length() and "pixel_values" in inputs:
        raise ValueError(
            "pixel_values came with a cache that is not empty: its images are in the cache, and "
            "images in a later turn are not supported. Leave pixel_values out, or start again "
            "with one prompt that has all images."
        )
    _check_outputs(inputs)
    if "position_ids" not in inputs:
        input_ids = inputs["input_ids"]
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + seen
        inputs["position_ids"] = positions[None]
    return inputs | {"return_dict": True}


def _check_outputs(inputs: Mapping[str, Any]) -> None:
    if inputs.get("output_attentions"):
        raise ValueError(
            "output_attentions is not supported: attention weights are never materialised. See "
            "ReducedModel.explain for what each reduction saw, or use the original model."
        )
    if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
        raise ValueError(
            "logits_to_keep is a tensor of prompt positions, and reductions move these. Give the "
            "number of last logits as an int, or 0 for all."
        )


def prompt_layout(model: PreTrainedModel, inputs: Mapping[str, Any]) -> PromptLayout:
    """Where the visual tokens of a batch are, after checking that every prompt has the same images.

    Args:
        model: The model.
        inputs: Arguments of its forward.

    Returns:
        The layout that a graph is lowered for.

    Raises:
        ValueError: If there is no image, prompts differ in their number of images, or images and
            placeholders do not match.
    """
    config = model.config
    rows, columns = grid_of(model)
    per_image = rows * columns
    placeholders = (inputs["input_ids"] == config.image_token_id).sum(dim=1)
    counts = sorted(set(placeholders.tolist()))
    if counts[-1] == 0 or "pixel_values" not in inputs:
        raise ValueError(
            "The prompt has no image: deos_fx reduces visual tokens, so the first call needs "
            f"pixel_values and image placeholders (token id {config.image_token_id}) in input_ids. "
            "Use the original model for text alone."
        )
    if len(counts) > 1 or counts[0] % per_image:
        raise ValueError(
            f"The prompts of this batch have {counts} image placeholders; every prompt needs the "
            f"same number of images of {per_image} tokens each. Batch prompts with equally many "
            "images of one size, or pass them one by one."
        )
    images = counts[0] // per_image
    given = inputs["pixel_values"].shape[0]
    if given != images * len(placeholders):
        raise ValueError(
            f"pixel_values has {given} images, but input_ids has placeholders for "
            f"{images * len(placeholders)}."
        )
    return PromptLayout(config.image_token_id, images, (rows, columns))
