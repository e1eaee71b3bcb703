"""Make the prompts that a reduced model is traced with for an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.inputs.batch import media_of_rows
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.inputs.items import IMAGES, beside, media
from deos_fx.models.facts import ModelFacts, facts_of
from deos_fx.tokens.layout import PromptLayout

__all__ = ["BATCH", "Example", "example_of", "kinds_of_tokens", "pixels_of", "word_of", "words"]

# Rows of the traced batch: torch.export takes an axis of length 1 for a constant.
BATCH = 2
# Noise on the pixels, as a share of the largest of them.
_NOISE = 0.25


@dataclass(frozen=True)
class Example:
    """A batch of equal prompts, to trace a model with: their words and pixels do not matter.

    Attributes:
        inputs: Arguments of the model's forward, with explicit position ids.
        images: The inputs that belong to the images, for one prompt.
        given: Names of the inputs that a call of the exported model may have.
        placeholders: Number of image placeholders in one prompt.
        layout: Where its visual tokens are.
    """

    inputs: dict[str, Tensor]
    images: dict[str, Tensor]
    given: tuple[str, ...]
    placeholders: int
    layout: PromptLayout


def example_of(model: PreTrainedModel, given: Mapping[str, Any] | None, text: int) -> Example:
    """Make prompts like the first one of a call, with more text.

    Args:
        model: The model that the prompts are for.
        given: Arguments of its forward. None makes prompts with one image, for models whose
            images all have one size.
        text: Text tokens to add: at the end, or in front of a prompt that ends in an image.

    Returns:
        `BATCH` equal prompts.

    Raises:
        ValueError: If the call has no image, prompts that cannot share a graph or inputs that
            cannot be exported, or if no call is given and the model needs one.
    """
    # 1. Sort the inputs of the call: of tokens, of images, and others, which are refused.
    facts = facts_of(model)
    call = _noisy(Call.of(facts, _one_image(facts) if given is None else given))
    complete = completed(call)
    # Numbers of crops, which nothing reads: a call may have them, and graphs do not.
    unread = call.images.keys() & beside(facts, IMAGES) - media(facts, IMAGES)
    images = {name: value for name, value in call.images.items() if name not in unread}
    ids = call.inputs["input_ids"]
    # Inputs with one value per prompt token: ids, masks, kinds of tokens.
    tokens = {
        name: value
        for name, value in call.inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and name not in images
    }
    known = {"position_ids", *pixels_of(images), *facts.size_inputs, *tokens, *unread}
    others = {name for name, value in call.inputs.items() if isinstance(value, Tensor)} - known
    if others:
        raise ValueError(
            f"example_inputs has {', '.join(sorted(others))}, which exported graphs do not take: "
            "they are for prompts of text and images. Leave it out, or run the model in PyTorch."
        )
    if "pixel_values" not in images:
        raise ValueError(
            "example_inputs has no pixel_values, so there is no image in the form that "
            "exported graphs take. Give pixel_values, or run the reduced model in PyTorch."
        )
    # 2. One prompt: the first row without its padding, with text added where it changes no image.
    layout = complete.layout
    tokens.pop("position_ids", None)
    real = tokens.get("attention_mask", torch.ones_like(ids))[0].bool()
    # How much to add before and after.
    around = (text, 0) if layout.ends else (0, text)
    prompt = {name: torch.nn.functional.pad(rows[0][real], around) for name, rows in tokens.items()}
    added = slice(text) if layout.ends else slice(-text, None)
    prompt["input_ids"][added] = word_of(facts)
    # All tokens are real. Kinds of tokens were padded with 0, which is text.
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    # 3. The batch: this prompt and its images, repeated.
    example = {name: row.expand(BATCH, -1).clone() for name, row in prompt.items()}
    own, repeated = (
        {name: value for name, value in media_of_rows(call, rows).items() if name in images}
        for rows in ([0], [0] * BATCH)
    )
    example |= repeated
    # 4. Its positions, a row for each prompt: `completed` makes one row if all have the same.
    positions = completed(Call.of(facts, example)).inputs["position_ids"]
    example["position_ids"] = positions.expand(*positions.shape[:-2], *example["input_ids"].shape)
    placeholders = int((prompt["input_ids"] == facts.image_token).sum())
    names = sorted({*example, *unread, "attention_mask", "position_ids"})
    return Example(example, own, tuple(names), placeholders, layout)


def pixels_of(images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with pixels: a model may take an image in several resolutions.

    Args:
        images: Inputs that belong to images; those with their sizes are integers.
    """
    return {name: value for name, value in images.items() if value.is_floating_point()}


def words(facts: ModelFacts, length: int) -> Tensor:
    """Return text tokens [B, length], none of them an image placeholder."""
    return torch.full((BATCH, length), word_of(facts), device=facts.model.device)


def word_of(facts: ModelFacts) -> int:
    """Return the id of a token that is neither the image placeholder nor padding."""
    padding = getattr(facts.model.config.get_text_config(), "pad_token_id", None)
    return next(token for token in range(3) if token not in (facts.image_token, padding))


def kinds_of_tokens(facts: ModelFacts) -> list[str]:
    """Return the inputs that say which tokens belong to an image: only a processor knows how."""
    names = "token_type_ids", "mm_token_type_ids"
    return [name for name in names if name in facts.arguments.parameters]


def _one_image(facts: ModelFacts) -> dict[str, Tensor]:
    """Make a prompt with one image between text, for models that need only its pixels."""
    kinds = kinds_of_tokens(facts)
    if facts.sizes_vary or kinds:
        reason = f"takes {kinds[0]}" if kinds else "takes images of many sizes"
        raise ValueError(
            f"{facts.name} {reason}: give example_inputs (on the command line, --image FILE), a "
            "call as its processor makes it, with as many images, and of such sizes, as prompts "
            "are to have."
        )
    rows, columns = facts.grid
    ids = torch.full((1, rows * columns), facts.image_token, device=facts.model.device)
    ids = torch.nn.functional.pad(ids, (1, 1), value=word_of(facts))
    plain = torch.ones_like(facts.image()["pixel_values"], device=ids.device)
    return {"input_ids": ids, "pixel_values": plain}


def _noisy(call: Call) -> Call:
    """Return a call with noise on the pixels.

    Tokens of a plain image, or of plain tiles, have equal scores, and which of these wins is left
    open: another one in PyTorch than in a runtime.
    """
    noisy = {}
    for name, value in pixels_of(call.images).items():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
        # Where all pixels of an image or a tile are zero, encoders take it for padding.
        noisy[name] = value + _NOISE * value.abs().max().clamp(min=1) * noise * (value != 0)
    return Call.of(call.facts, {**call.inputs, **noisy})
