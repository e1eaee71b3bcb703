"""Give prompts placeholders where a model puts images in front of the text itself.

Such a model takes the text alone, and its sequence is longer. All other code finds visual tokens by
their placeholders, so a call gets some: `IN_FRONT` in the ids, and what goes with them in other
inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import IN_FRONT, PIXELS
from deos_fx.models.upstream import CACHE
from deos_fx.tokens.cache import ReducedCache
from deos_fx.words import counted

__all__ = ["with_places", "without_places"]

# Inputs with a value for every token -> that of a placeholder. Visual tokens take no position of
# the text.
_OF_PLACES = {
    "input_ids": IN_FRONT,
    "attention_mask": 1,
    "position_ids": 0,
    "labels": -100,
    "shift_labels": -100,
}


def with_places(facts: ModelFacts, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call with placeholders in front of the text.

    They may be there already. A mask that goes on after a prompt with images gets flags for these.

    Args:
        facts: The facts of a model that puts images in front of the text.
        inputs: Arguments of its forward, in their one form.

    Raises:
        ValueError: If not every prompt has one image of the config's size, or a mask is not one
            flag for each token.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or bool((ids == IN_FRONT).any()):
        return dict(inputs)
    cache = inputs.get(CACHE)
    seen = cache.get_seq_length() if isinstance(cache, ReducedCache) else 0
    if seen and isinstance(mask, Tensor) and mask.ndim == 2:
        # Case: the text goes on. Its own tokens may be flagged alone.
        return {**inputs, "attention_mask": _after(mask, seen + ids.shape[1] - mask.shape[1], 1)}
    if seen or PIXELS[0] not in inputs:
        # Case: new tokens without a mask, or text alone.
        return dict(inputs)
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        raise ValueError(
            f"attention_mask is {tuple(getattr(mask, 'shape', ()))} for input_ids "
            f"{tuple(ids.shape)}: {facts.name} puts images in front of the text, and takes flags "
            "[B, N] of real tokens of the text."
        )
    count = _tokens_in_front(facts, inputs[PIXELS[0]], len(ids))
    # Without a mask, gaps in the positions would be taken for borders of packed samples.
    given = {"attention_mask": torch.ones_like(ids), **inputs}
    if isinstance(given.get("labels"), Tensor):
        # The model lets no image predict a word, so the first one has no label.
        given["labels"] = _after(given["labels"][:, 1:], 1, -100)
    found = {
        name: _after(given[name], count, value)
        for name, value in _OF_PLACES.items()
        if isinstance(given.get(name), Tensor)
    }
    return given | found


def without_places(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call as the model itself takes them.

    Args:
        inputs: Arguments of the model's forward, without labels.
    """
    count = int((inputs["input_ids"][0] == IN_FRONT).sum())
    return {
        name: value[..., count:] if name in _OF_PLACES and count else value
        for name, value in inputs.items()
    }


def _tokens_in_front(facts: ModelFacts, pixels: Tensor, rows: int) -> int:
    """Return the number of visual tokens in front of each row."""
    expected = (rows, *facts.image()[PIXELS[0]].shape[1:])
    if pixels.shape != expected:
        raise ValueError(
            f"pixel_values is {tuple(pixels.shape)} for {counted(rows, 'prompt')}: {facts.name} "
            f"puts images in front of the text, which is supported for one image of each prompt, "
            f"of the config's size, {expected}. Make inputs with the model's processor, and ask "
            "about frames of a video one by one."
        )
    return math.prod(facts.grid)


def _after(values: Tensor, count: int, value: int) -> Tensor:
    """Return values [..., N] behind `count` times the same one."""
    return torch.cat([values.new_full((*values.shape[:-1], max(count, 0)), value), values], dim=-1)
