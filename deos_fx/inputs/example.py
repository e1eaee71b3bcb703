"""Make a prompt with one grey image, to capture, inspect or export a model with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.data import Record, batches
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.models.families import MARKS
from deos_fx.models.shapes_only import count_visual_tokens

__all__ = ["QUESTION", "TEXT_TOKENS", "example_inputs", "processed_example"]

QUESTION = "What is shown here?"
"""Asked of an image where the words do not matter."""

TEXT_TOKENS = 16
"""Text tokens of the prompt, the one before the image included."""

# Patches on each side of an image whose size the config leaves open.
_SIDE = 32


def example_inputs(model: PreTrainedModel, processor: Any = None) -> dict[str, Tensor]:
    """Make a prompt with one grey image and a few words.

    Args:
        model: A vision-language model with image placeholders in its prompt; it may be on the meta
            device.
        processor: The model's processor, used where the size of an image matters. Without one, the
            inputs of an image are derived from the config.

    Returns:
        ``input_ids``, ``attention_mask`` ``[1, V + 16]`` (``[1, 16]`` if the model puts the image
        in front of the text itself) and the inputs that the image comes in.

    Raises:
        ValueError: If `model` reads no images, or its inputs for them cannot be derived.
    """
    facts = facts_of(model)
    # Case: the size of an image matters, and only the processor knows which sizes are usual.
    if processor is not None and facts.sizes_vary:
        return processed_example(processor)
    # Case: otherwise the first form that the encoder takes. The config does not say which it is.
    for form in _forms(facts):
        images = form | facts.words
        count = count_visual_tokens(model, images)
        if count:
            return _prompt(facts, images, count)
    raise ValueError(
        f"How an image becomes inputs of {facts.name} does not follow from its config. "
        "Save its processor in the model's folder (processor.save_pretrained), or in Python give "
        "deos_fx the inputs of a call."
    )


def processed_example(processor: Any, record: Record | None = None) -> dict[str, Tensor]:
    """Return the inputs that a processor makes of a question.

    Args:
        processor: The processor.
        record: The question; by default one about a grey image of 448 x 448 pixels.
    """
    if record is None:
        record = Record(Image.new("RGB", (448, 448), (128, 128, 128)), QUESTION)
    return next(batches(processor, [record], 1))


def _forms(facts: ModelFacts) -> Iterator[dict[str, Tensor]]:
    """Yield the forms in which models of transformers take an image, to try on the encoder."""
    model, names = facts.model, facts.size_inputs
    config: Any = getattr(model.config, "vision_config", model.config)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    given = getattr(config, "image_size", None) or 0
    height, width = given if isinstance(given, (list, tuple)) else (given, given)
    # Case: the config names a size of images.
    if height:
        pixels = torch.full((1, channels, height, width), 0.5, dtype=model.dtype)
        yield {"pixel_values": pixels}
        if "image_sizes" in names:
            sizes = torch.tensor([[height, width]])
            yield {"pixel_values": pixels, "image_sizes": sizes}
            # More tiles than any layout needs; the encoder drops the surplus.
            yield {"pixel_values": pixels.expand(1, 64, -1, -1, -1), "image_sizes": sizes}
        if "pixel_attention_mask" in names:
            mask = torch.ones(1, 1, height, width, dtype=torch.int64)
            yield {"pixel_values": pixels[None], "pixel_attention_mask": mask}
    # Case: flat patches, with a table of frames, rows and columns.
    if "image_grid_thw" in names:
        patch = config.patch_size
        side = height // patch or _SIDE
        side -= side % getattr(config, "spatial_merge_size", 1)
        values = channels * getattr(config, "temporal_patch_size", 1) * patch**2
        flat = torch.full((side**2, values), 0.5, dtype=model.dtype)
        yield {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, side, side]])}


def _prompt(facts: ModelFacts, images: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    # One word, the image, and the other words. Any id will do for a word, save the placeholder's.
    token = facts.image_token
    if facts.in_front:
        # Case: words alone, since the model puts the image in front of them.
        ids = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    ids = torch.full((1, count + TEXT_TOKENS), next(word for word in range(2) if word != token))
    ids[:, 1 : count + 1] = token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    if MARKS in facts.arguments.parameters:
        # Case: flags say where the image is, and any word may stand there.
        return inputs | {MARKS: (ids == token).long(), "input_ids": ids.clamp(min=0)}
    if "mm_token_type_ids" in facts.arguments.parameters:
        inputs["mm_token_type_ids"] = (ids == token).int()
    return inputs
