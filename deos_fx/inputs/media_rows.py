"""Selecting the inputs about images that belong to some prompts of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.inputs.items import table_of_sizes
from deos_fx.inputs.kinds import beside, given_kinds
from deos_fx.inputs.media import PromptImages
from deos_fx.models.families import PATCH_NUMBERS

__all__ = ["media_of_rows"]


def media_of_rows(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    prompts: Sequence[PromptImages],
    rows: Sequence[int],
) -> dict[str, Any]:
    """Select the inputs about images for some prompts.

    Args:
        model: The model.
        inputs: Arguments of its forward.
        prompts: The images of every prompt.
        rows: The prompts to take, in their new order; one may come more than once.

    Returns:
        The inputs about images by name; None for those of a kind that none of the prompts has.

    Raises:
        ValueError: If it is unclear which pixels belong to which image.
    """
    taken: dict[str, Any] = {}
    for kind in given_kinds(inputs):
        spans = [
            (row, *next(((a, b) for one, a, b in prompts[row].items if one is kind), (0, 0)))
            for row in rows
        ]
        given = {name: inputs[name] for name in beside(model, kind) & inputs.keys()}
        values = {name: value for name, value in given.items() if isinstance(value, (Tensor, list))}
        if not any(b > a for _, a, b in spans):
            taken |= dict.fromkeys(values)
            continue
        total = sum(b - a for prompt in prompts for one, a, b in prompt.items if one is kind)
        table = table_of_sizes(model, inputs, kind)
        frames = _frames(values, total, table)
        for name, value in values.items():
            if name in PATCH_NUMBERS:
                raise ValueError(
                    f"{name} counts the patches of a whole batch, which cannot be divided. Pass "
                    "prompts with different images one by one."
                )
            if len(value):
                units = _units(name, value, spans, total, table, frames, len(prompts))
                taken[name] = (
                    value[units] if isinstance(value, Tensor) else [value[unit] for unit in units]
                )
    return taken


def _frames(
    values: Mapping[str, Tensor | list[Any]], images: int, table: Tensor | None
) -> list[int]:
    """Return the number of frames of each video, if one of the inputs has it."""
    if table is not None and table.shape[1] == 3:
        return table[:, 0].tolist()
    for name, value in values.items():
        if "num_frames" in name and len(value) == images:
            return [int(count) for count in value]
    return []


def _units(
    name: str,
    value: Tensor | list[Any],
    spans: Sequence[tuple[int, int, int]],
    images: int,
    table: Tensor | None,
    frames: Sequence[int],
    batch: int,
) -> list[int]:
    """Find the entries of the leading axis that belong to prompts (row, first image, end).

    Raises:
        ValueError: If the number of entries fits no count of images, patches, frames or prompts.
    """
    areas = [] if table is None else table.prod(dim=-1).tolist()
    share, rest = divmod(sum(areas), len(value))
    counts: list[Sequence[int]] = [[1] * images, areas, frames]
    if len(value) not in map(sum, counts):
        # Case: one entry for each prompt.
        if len(value) == batch:
            return [row for row, _, _ in spans]
        if share and not rest and not any(area % share for area in areas):
            # Case: one entry for each token, made from several patches.
            counts.append([area // share for area in areas])
    for of_images in counts:
        if len(value) == sum(of_images):
            ends = list(itertools.accumulate(of_images, initial=0))
            return [unit for _, a, b in spans for unit in range(ends[a], ends[b])]
    raise ValueError(
        f"{name} has {len(value)} entries for {images} images in {batch} prompts, so it cannot be "
        "told which belong to which prompt. Pass prompts with different images one by one."
    )
