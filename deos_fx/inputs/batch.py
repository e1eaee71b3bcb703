"""Batches whose prompts differ in their images: run in parts of like prompts, then joined.

A lowered graph keeps a constant number of visual tokens, so prompts with other images go through
another graph. The results are padded on the left to the longest, and the padding is masked from
then on: decoding runs on the whole batch again.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.inputs.kinds import has_images
from deos_fx.inputs.media import (
    images_of_prompts,
    placeholders,
)
from deos_fx.inputs.media_rows import media_of_rows
from deos_fx.inputs.packed import refuse_lengths
from deos_fx.models.upstream import CACHE
from deos_fx.tokens.cache import TokenSpace, in_rows
from deos_fx.tokens.layout import PromptLayout

__all__ = ["Part", "join_outputs", "join_spaces", "parts_of_batch"]


@dataclass(frozen=True)
class Part:
    """Prompts of a batch that are alike.

    Attributes:
        rows: Their row numbers in the batch.
        layout: Their visual tokens; None for prompts of text alone.
        inputs: The inputs of the model's forward for these prompts alone.
    """

    rows: tuple[int, ...]
    layout: PromptLayout | None
    inputs: dict[str, Any]


def parts_of_batch(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Part]:
    """Group the prompts of a batch by their images and by whether they end in one.

    Args:
        model: The model.
        inputs: Arguments of its forward.

    Returns:
        The parts; one part with the inputs as they are if all prompts are alike.

    Raises:
        ValueError: If images and placeholders do not match, if packed samples come with their
            lengths, or if the prompts differ and there are labels, whose loss is a mean over all
            prompts.
    """
    ids = inputs["input_ids"]
    refuse_lengths(inputs)
    # Case: text alone.
    if not has_images(inputs):
        if bool(placeholders(model, ids).any()):
            raise ValueError(
                "input_ids has image placeholders, but there are no images: pass pixel_values, and "
                "whatever else the model's processor returns."
            )
        return [Part(tuple(range(len(ids))), None, {**inputs})]
    prompts = images_of_prompts(model, inputs)
    alike: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        alike.setdefault(prompt.alike, []).append(row)
    if len(alike) == 1:
        return [Part(tuple(range(len(ids))), prompts[0].layout, {**inputs})]
    if "labels" in inputs:
        raise ValueError(
            "The prompts of this batch have different images, or some end in an image and others "
            "in text, and labels ask for the mean loss over all of them. Give labels with prompts "
            "that have equally many images of the same sizes and end alike."
        )
    parts = []
    for rows in alike.values():
        own = {name: _rows_of(name, value, rows, len(ids)) for name, value in inputs.items()}
        own |= media_of_rows(model, inputs, prompts, rows)
        own = {name: value for name, value in own.items() if value is not None}
        parts.append(Part(tuple(rows), prompts[rows[0]].layout, own))
    return parts


def _rows_of(name: str, value: Any, rows: Sequence[int], batch: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Positions may have several coordinates [k, B, N], or be shared by all rows [1, N].
    axis = value.ndim - 2 if name == "position_ids" else 0
    if value.ndim and value.shape[axis] == batch:
        return value.index_select(axis, torch.tensor(rows, device=value.device))
    return value


def join_outputs(parts: Sequence[Part], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the outputs of a batch's parts in the order of its rows.

    Args:
        parts: The parts.
        outputs: The fields of the model's output for each part. Fields that not all parts have are
            left out, and so are features of images, which belong to no row.

    Returns:
        The fields: tensors [B, M, ...], shorter rows with zeros on their left, and tuples of such
        tensors.
    """
    common = [name for name in outputs[0] if all(name in fields for fields in outputs)]
    return {
        name: _joined(parts, [fields[name] for fields in outputs])
        for name in common
        if "image" not in name and "video" not in name and name != CACHE
    }


def join_spaces(
    parts: Sequence[Part], spaces: Sequence[Sequence[TokenSpace]], length: int
) -> list[TokenSpace]:
    """Join the token spaces of a batch's parts in the order of its rows.

    Args:
        parts: The parts.
        spaces: The spaces of each part, in order of depth.
        length: N of the prompts.

    Returns:
        The spaces; ``origin`` is -1 where a row is padded.
    """
    joined = []
    for same in zip(*spaces, strict=True):
        origin = _joined(parts, [space.origin + 1 for space in same]) - 1
        bias = None
        if same[0].key_bias is not None:
            bias = _joined(parts, [space.key_bias for space in same])
        # Rows may have dropped different numbers of tokens now, so each has a shift of its own.
        shift = _joined(
            parts,
            [
                space.origin.new_full((len(space.origin), 1), length - space.origin.shape[1])
                if space.shift is None
                else space.shift
                for space in same
            ],
        )
        joined.append(TokenSpace(same[0].first_layer, origin, bias, shift))
    return joined


def _joined(parts: Sequence[Part], values: Sequence[Any]) -> Any:
    """Return the values of all rows in the order of the batch; shorter ones get leading zeros."""
    if isinstance(values[0], tuple):
        return tuple(_joined(parts, same) for same in zip(*values, strict=True))
    rows = [row for part in parts for row in part.rows]
    return in_rows(values, rows, axis=1)
