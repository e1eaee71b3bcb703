"""Divide a batch whose prompts differ in their images into parts of like prompts, and join results.

A lowered graph keeps a constant number of visual tokens, so prompts with other images go through
another graph. The results are padded on the left to the longest. From then on the padding is
masked, and decoding runs on the whole batch again.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deos_fx.errors import Undivided
from deos_fx.inputs.call import Call, batch_axis
from deos_fx.inputs.items import Kind, beside, given_kinds, table_of_sizes
from deos_fx.inputs.media import placeholders
from deos_fx.inputs.packed import refuse_lengths
from deos_fx.models.families import PATCH_NUMBERS
from deos_fx.models.upstream import CACHE
from deos_fx.tokens.cache import TokenSpace, in_rows
from deos_fx.tokens.layout import PromptLayout
from deos_fx.words import counted

__all__ = [
    "Part",
    "join_outputs",
    "join_spaces",
    "media_between",
    "media_of_rows",
    "parts_of_batch",
]


@dataclass(frozen=True)
class Part:
    """Prompts of a batch that are alike.

    Attributes:
        rows: Their row numbers in the batch.
        layout: Their visual tokens; None for prompts of text alone.
        call: The call of these prompts alone.
    """

    rows: tuple[int, ...]
    layout: PromptLayout | None
    call: Call


def parts_of_batch(call: Call) -> list[Part]:
    """Group the prompts of a batch by their images and by whether they end in one.

    Args:
        call: The call of the batch.

    Returns:
        The parts; one part with the call as it is if all prompts are alike.

    Raises:
        ValueError: If images and placeholders do not match, if packed samples come with their
            lengths, or if the prompts differ and there are labels, whose loss is a mean over all
            prompts.
    """
    inputs, ids = call.inputs, call.inputs["input_ids"]
    refuse_lengths(inputs)
    # Case: text alone. Placeholders without pixels would be taken for words.
    if not call.has_images:
        if bool(placeholders(call.facts, inputs).any()):
            raise ValueError(
                "input_ids has image placeholders, but there are no images: pass pixel_values, and "
                "whatever else the model's processor returns."
            )
        return [Part(tuple(range(len(ids))), None, call)]
    # Group row numbers by what decides the graph, in the order of first appearance.
    prompts = call.prompts
    alike: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        alike.setdefault(prompt.alike, []).append(row)
    if len(alike) == 1:
        return [Part(tuple(range(len(ids))), prompts[0].layout, call)]
    if "labels" in inputs:
        raise ValueError(
            "The prompts of this batch have different images, or some end in an image and others "
            "in text, and labels ask for the mean loss over all of them. Give labels with prompts "
            "that have equally many images of the same sizes and end alike."
        )
    parts = []
    for rows in alike.values():
        # Inputs with a row for each prompt are indexed; those about images are counted off.
        own = {name: _rows_of(name, value, rows, len(ids)) for name, value in inputs.items()}
        own |= media_of_rows(call, rows)
        parts.append(Part(tuple(rows), prompts[rows[0]].layout, Call.of(call.facts, own)))
    return parts


def _rows_of(name: str, value: Any, rows: Sequence[int], batch: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    axis = batch_axis(name, value)
    # Positions [1, N] that all rows share, and numbers, stay as they are.
    if value.ndim and value.shape[axis] == batch:
        return value.index_select(axis, torch.tensor(rows, device=value.device))
    return value


def media_of_rows(call: Call, rows: Sequence[int]) -> dict[str, Any]:
    """Select the inputs about images for some prompts.

    Args:
        call: The call.
        rows: The prompts to take, in their new order; one may come more than once.

    Returns:
        The inputs about images by name; None for those of a kind that none of the prompts has.

    Raises:
        ValueError: If it is unclear which pixels belong to which image.
    """
    prompts = call.prompts
    return _media_of(call, [(row, prompts[row].items) for row in rows])


def media_between(call: Call, first: int, past: int) -> dict[str, Any]:
    """Select the inputs about the images of all prompts that begin in a range of positions.

    Args:
        call: The call.
        first: First position.
        past: One past the last position.

    Returns:
        The inputs about images by name; None for those of a kind of which there are none.

    Raises:
        ValueError: If it is unclear which pixels belong to which image.
    """
    chosen = []
    for row, prompt in enumerate(call.prompts):
        found: dict[Kind, list[int]] = {}
        for kind, number, start in prompt.starts:
            if first <= start < past:
                found.setdefault(kind, []).append(number)
        # Images of a prompt are in the order of its text, so a range of these is one of numbers.
        spans = [(kind, numbers[0], numbers[-1] + 1) for kind, numbers in found.items()]
        chosen.append((row, spans))
    return _media_of(call, chosen)


def _media_of(
    call: Call, chosen: Sequence[tuple[int, Sequence[tuple[Kind, int, int]]]]
) -> dict[str, Any]:
    """Select the inputs about images: for each row, kinds with the range of their numbers."""
    facts, inputs, prompts = call.facts, call.inputs, call.prompts
    taken: dict[str, Any] = {}
    for kind in given_kinds(inputs):
        # For each prompt: its row, and the range of its images in the flat list of the batch.
        spans = [
            (row, *next(((a, b) for one, a, b in items if one is kind), (0, 0)))
            for row, items in chosen
        ]
        given = {name: inputs[name] for name in beside(facts, kind) & inputs.keys()}
        values = {name: value for name, value in given.items() if isinstance(value, (Tensor, list))}
        if not any(b > a for _, a, b in spans):
            # Case: none of these prompts has media of this kind.
            taken |= dict.fromkeys(values)
            continue
        total = sum(b - a for prompt in prompts for one, a, b in prompt.items if one is kind)
        table = table_of_sizes(facts, inputs, kind)
        frames = _frames(values, total, table)
        tokens = [size for one in prompts if one.layout for size in one.layout.sizes]
        for name, value in values.items():
            if name in PATCH_NUMBERS:
                # Case: numbers of patches, counted through the whole batch.
                alike = (spans, total, table, frames, tokens, len(prompts))
                taken[name] = _renumbered(name, value, values[kind.pixels], *alike)
                continue
            if (strip := _strip(value, table)) is not None:
                # Case: the patches of all images side by side.
                taken[name] = torch.cat([strip[i] for _, a, b in spans for i in range(a, b)], -1)
            elif len(value):
                units = _units(name, value, spans, total, table, frames, tokens, len(prompts))
                taken[name] = (
                    value[units] if isinstance(value, Tensor) else [value[unit] for unit in units]
                )
    return taken


def from_first_patch(numbers: Tensor) -> Tensor:
    """Count the patches of some images from the first of them on.

    Args:
        numbers: Numbers of patches [tokens, patches of a token], counted through a whole batch; -1
            stands for none. Each patch is part of a token, so the least is that of the first one.
    """
    given = numbers >= 0
    return torch.where(given, numbers - numbers[given].min(), numbers) if given.any() else numbers


def _renumbered(
    name: str, value: Any, pixels: Any, spans: Sequence[tuple[int, int, int]], *counts: Any
) -> Tensor:
    """Count patches through the images that are taken; -1 stands for none.

    Args:
        name: Name of the input.
        value: The numbers of the patches that make each token of the batch.
        pixels: Patches of the batch [tiles, patches, ...].
        spans: As for `_units`.
        counts: The other arguments of `_units`.
    """
    parts, before = [], 0
    for span in spans:
        own = from_first_patch(value[_units(name, value, [span], *counts)])
        parts.append(torch.where(own < 0, own, own + before))
        tiles = _units(name, pixels, [span], *counts)
        before += pixels[tiles].shape[:2].numel()
    return torch.cat(parts)


def _strip(value: Tensor | list[Any], table: Tensor | None) -> Sequence[Tensor] | None:
    """Divide pixels [1, C, P, P * patches] into those of each image; None if they are no strip."""
    if table is None or not isinstance(value, Tensor) or value.ndim != 4 or len(value) != 1:
        return None
    widths = [value.shape[2] * area for area in table.prod(dim=-1).tolist()]
    return value.split(widths, dim=-1) if sum(widths) == value.shape[3] else None


# What is in the names of inputs that say how many frames a video has, or tiles an image.
_NUMBERS = ("num_frames", "num_crops", "num_local_patches")


def _frames(
    values: Mapping[str, Tensor | list[Any]], images: int, table: Tensor | None
) -> list[int]:
    """Return the number of frames of each video, or of tiles of each image; none if none tells."""
    # A table of sizes with three columns has frames, height and width.
    if table is not None and table.shape[1] == 3:
        return table[:, 0].tolist()
    for name, value in values.items():
        if any(word in name for word in _NUMBERS) and len(value) == images:
            return [int(count) for count in value]
    return []


def _units(
    name: str,
    value: Tensor | list[Any],
    spans: Sequence[tuple[int, int, int]],
    images: int,
    table: Tensor | None,
    frames: Sequence[int],
    tokens: Sequence[int],
    batch: int,
) -> list[int]:
    """Find the entries of an input's leading axis that belong to some prompts.

    No name says what an axis counts, so its length has to tell:

    1. One entry for each image, for each patch (the area of each image), or for each frame.
    2. One entry for each prompt.
    3. One entry for each token, made from several patches, or wherever else a token comes from.

    Args:
        name: Name of the input.
        value: The input.
        spans: For each prompt wanted, its row, its first image and one past its last.
        images: Images of the whole batch.
        table: Sizes of all images, if they are given.
        frames: Frames of each video, if they are known.
        tokens: Visual tokens of each image or video.
        batch: Prompts of the whole batch.

    Raises:
        ValueError: If the number of entries fits no count of images, patches, frames or prompts.
    """
    areas = [] if table is None else table.prod(dim=-1).tolist()
    share, rest = divmod(sum(areas), len(value))
    # Case 1: what one image takes of the axis, in the order in which readings are tried.
    counts: list[Sequence[int]] = [[1] * images, areas, frames]
    if len(value) not in map(sum, counts):
        # Case 2.
        if len(value) == batch:
            return [row for row, _, _ in spans]
        if share and not rest and not any(area % share for area in areas):
            # Case 3: every image must have a whole number of tokens.
            counts.append([area // share for area in areas])
        if len(tokens) == images:
            counts.append(tokens)
    for of_images in counts:
        if len(value) == sum(of_images):
            ends = list(itertools.accumulate(of_images, initial=0))
            return [unit for _, a, b in spans for unit in range(ends[a], ends[b])]
    raise Undivided(
        f"{name} has {counted(len(value), 'entry', 'entries')} for {counted(images, 'image')} in "
        f"{counted(batch, 'prompt')}, so it cannot be told which belong to which prompt. Pass "
        "prompts with different images one by one."
    )


def join_outputs(parts: Sequence[Part], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the outputs of a batch's parts in the order of its rows.

    Args:
        parts: The parts.
        outputs: The fields of the model's output for each part.

    Returns:
        The fields: tensors [B, M, ...], shorter rows with zeros on their left, and tuples of such
        tensors. Left out are fields that only some parts have, features of images, which belong to
        no row, and the cache, which is joined by itself.
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
        # Padding is 0 and has to become -1, so positions count from 1 while they are joined.
        origin = _joined(parts, [space.origin + 1 for space in same]) - 1
        bias = None
        if same[0].key_bias is not None:
            bias = _joined(parts, [space.key_bias for space in same])
        # Rows may have dropped different numbers of tokens, so each gets a shift of its own.
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
    # Case: one value for each layer, such as hidden states.
    if isinstance(values[0], tuple):
        return tuple(_joined(parts, same) for same in zip(*values, strict=True))
    rows = [row for part in parts for row in part.rows]
    return in_rows(values, rows, axis=1)
