"""The images and videos of a batch: how many visual tokens each has, and whose they are.

transformers gives the pixels of a batch as flat lists: of images, of their tiles, of their patches,
with tables that say how large each image is. Here they are counted, found in the prompts by their
placeholders, and taken apart again where prompts have to go separate ways.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.hooks import shallow_copy
from deos_fx.passes.capture import PIXELS, features_of
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.shapes_only import ShapesOnly
from deos_fx.signature import grid_of, image_token_of, size_inputs, sizes_vary, video_token_of
from deos_fx.tokens import is_separator

__all__ = [
    "PromptImages",
    "encoder_inputs",
    "has_images",
    "image_inputs",
    "images_of_prompts",
    "media_of_rows",
]

_ENCODED: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, list[_Item] | None]]
_ENCODED = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Kind:
    """Images, or videos.

    Attributes:
        pixels: The input with their pixels.
        encode: The method of the model's core that makes features of them.
        others: Inputs with a row for every one, beside those the encoder takes.
    """

    pixels: str
    encode: str
    others: frozenset[str] = frozenset()


_IMAGES = _Kind(PIXELS[0], "get_image_features")
_VIDEOS = _Kind(
    PIXELS[1], "get_video_features", frozenset({"second_per_grid_ts", "video_second_per_grid"})
)


class _Item(NamedTuple):
    """One image, or one video.

    Attributes:
        grids: Rows and columns of each of its frames; None if that is not known.
        tokens: Its placeholders, ends of rows included.
        ends: Those that stand for the end of a row.
    """

    grids: tuple[tuple[int, int], ...] | None
    tokens: int
    ends: int = 0


@dataclass(frozen=True)
class PromptImages:
    """What one prompt shows.

    Attributes:
        layout: Its visual tokens; None for a prompt of text alone.
        items: Of each kind, the first of its images and the one behind the last.
    """

    layout: PromptLayout | None
    items: tuple[tuple[_Kind, int, int], ...]


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether there are pixels of images or videos among the inputs of a call."""
    return any(name in inputs for name in PIXELS)


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the inputs that images and videos come in: pixels, and how large each is."""
    given = [kind for kind in (_IMAGES, _VIDEOS) if kind.pixels in inputs]
    names = sorted(frozenset().union(*(_media(model, kind) | kind.others for kind in given)))
    return {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}


def images_of_prompts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[PromptImages]:
    """What every prompt of a batch shows.

    Args:
        model: The model.
        inputs: Arguments of its forward, with pixels.

    Returns:
        One description for each prompt.

    Raises:
        ValueError: If images and placeholders do not match.
    """
    kinds = {_token(model, kind): kind for kind in (_IMAGES, _VIDEOS) if kind.pixels in inputs}
    items = {
        token: _items(model, inputs, kind, (inputs["input_ids"] == token).sum(dim=1).tolist())
        for token, kind in kinds.items()
    }
    waiting = {token: iter(enumerate(given)) for token, given in items.items()}
    found = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        placeholders = [token for token in ids if token in kinds]
        shown = list(_shown(placeholders, waiting, row))
        found.append(_of_prompt(tuple(kinds), kinds, shown))
    for token, rest in waiting.items():
        total, left = len(items[token]), sum(1 for _ in rest)
        if left:
            raise ValueError(
                f"{kinds[token].pixels} has {total} images, but input_ids has placeholders (token "
                f"id {token}) for {total - left}. Make both with the same call of the model's "
                "processor."
            )
    return found


def _token(model: PreTrainedModel, kind: _Kind) -> int:
    token = image_token_of(model) if kind is _IMAGES else video_token_of(model)
    if token is None:
        raise ValueError(
            f"{kind.pixels} was given, but the config of {type(model).__name__} names no "
            "placeholder for videos (video_token_id). Give the frames as images."
        )
    return token


def _shown(
    placeholders: Sequence[int], waiting: Mapping[int, Iterator[tuple[int, _Item]]], row: int
) -> Iterator[tuple[int, int, _Item]]:
    """The images of a prompt, in the order of their placeholders: kind, number and size."""
    place = 0
    while place < len(placeholders):
        token = placeholders[place]
        number, item = next(waiting[token], (0, None))
        if item is None or placeholders[place : place + item.tokens] != [token] * item.tokens:
            raise ValueError(
                f"Prompt {row} of the batch has {len(placeholders)} image placeholders (token id "
                f"{token}), which are not those of the images given. Make input_ids and pixels "
                "with the same call of the model's processor."
            )
        yield token, number, item
        place += item.tokens


def _of_prompt(
    tokens: tuple[int, ...],
    kinds: Mapping[int, _Kind],
    shown: Sequence[tuple[int, int, _Item]],
) -> PromptImages:
    items = []
    for token, kind in kinds.items():
        numbers = [number for other, number, _ in shown if other == token]
        if numbers:
            items.append((kind, numbers[0], numbers[-1] + 1))
    if not shown:
        return PromptImages(None, ())
    placed = all(item.grids is not None for _, _, item in shown)
    grids = [
        grid for _, _, item in shown for grid in item.grids or ((1, item.tokens - item.ends),)
    ]
    layout = PromptLayout(
        tokens[0] if len(tokens) == 1 else tokens,
        len(grids),
        grids[0],
        separators=sum(item.ends for _, _, item in shown),
        placed=placed,
        grids=tuple(grids) if len(set(grids)) > 1 else (),
    )
    return PromptImages(layout, tuple(items))


# *** how many visual tokens an image has ***


def _items(
    model: PreTrainedModel, inputs: Mapping[str, Any], kind: _Kind, of_rows: list[int]
) -> list[_Item]:
    """All images of a batch, whose prompts have so many placeholders each.

    Where it cannot be told which token is of which image, those of a prompt count as one.
    """
    pixels, placeholders = inputs[kind.pixels], sum(of_rows)
    if kind is _IMAGES and not sizes_vary(model):
        rows, columns = grid_of(model)
        # As many as are no square may have a class token or registers among them, and no rows.
        grids = ((rows, columns),) if rows == columns else None
        return [_Item(grids, rows * columns)] * math.prod(pixels.shape[:-3])
    table = _table(model, inputs, kind)
    found = None
    if getattr(model.base_model, "image_newline", None) is None:
        if table is not None:
            found = _of_table(table.tolist(), placeholders)
        elif kind is _IMAGES and pixels.ndim == 5:
            found = _of_tiles(pixels, placeholders)
    found = found or _encoded(model, inputs, kind)
    return found or [_Item(None, tokens) for tokens in of_rows if tokens]


def _table(model: PreTrainedModel, inputs: Mapping[str, Any], kind: _Kind) -> Tensor | None:
    """The input with height and width, perhaps behind frames, of every image."""
    sizes = [inputs[name] for name in sorted(_media(model, kind)) if name in inputs]
    return next((size for size in sizes if size.ndim == 2 and size.shape[1] in (2, 3)), None)


def _of_table(sizes: list[list[int]], placeholders: int) -> list[_Item] | None:
    """The images of a table of sizes: all have one token for as many patches or pixels.

    None if the placeholders are no such share of the sizes.
    """
    area = sum(math.prod(size) for size in sizes)
    share, rest = divmod(area, placeholders or area + 1)
    side = math.isqrt(share)
    if rest or not share:
        return None
    found = []
    for size in sizes:
        height, width = size[-2:]
        frames = size[0] if len(size) == 3 else 1
        tokens, rest = divmod(math.prod(size), share)
        if rest:
            return None
        whole = side * side == share and height % side == 0 and width % side == 0
        grids = ((height // side, width // side),) * frames if whole else None
        found.append(_Item(grids, tokens))
    return found


def _of_tiles(pixels: Tensor, placeholders: int) -> list[_Item]:
    """The tiles [B, T, 3, H, W] of prompts; those that fill a prompt up are zero."""
    real = int((pixels != 0).flatten(2).any(dim=-1).sum())
    tokens, rest = divmod(placeholders, real)
    if rest:
        raise ValueError(
            f"pixel_values has {real} tiles of images that are not zero, and input_ids has "
            f"{placeholders} placeholders, which is no multiple. Make both with the same call of "
            "the model's processor."
        )
    height, width = pixels.shape[-2:]
    rows = math.isqrt(tokens * height // width)
    whole = rows and rows * rows * width == tokens * height
    return [_Item(((rows, tokens // rows),) if whole else None, tokens)] * real


def _encoded(
    model: PreTrainedModel, inputs: Mapping[str, Any], kind: _Kind
) -> list[_Item] | None:
    """The images as the model's own encoder makes them; it runs once for each set of sizes.

    Only their number matters unless there are ends of rows, whose features are a parameter of the
    model, whatever the pixels are. None if the encoder does not keep images apart.
    """
    core: Any = model.base_model
    given = {name: inputs[name] for name in sorted(_media(model, kind)) if name in inputs}
    sizes = tuple(
        (name, tuple(value.shape), repr(value.tolist()) if value.ndim < 3 else "")
        for name, value in given.items()
        if isinstance(value, Tensor)
    )
    known = _ENCODED.setdefault(model, {})
    if sizes not in known:
        newline = getattr(core, "image_newline", None)
        shapes_suffice = newline is None or newline.is_meta
        with torch.no_grad(), ShapesOnly() if shapes_suffice else contextlib.nullcontext():
            features = features_of(getattr(core, kind.encode)(**given, return_dict=True))
        apart = isinstance(features, (list, tuple))
        if not apart and (features is None or features.ndim < 3):
            known[sizes] = None
            return None
        counts = [math.prod(part.shape[:-1]) for part in features]
        if newline is None:
            ends = [0] * len(counts)
        elif newline.is_meta:
            ends = _ends_without_weights(core, kind, given, counts)
        else:
            ends = [int(is_separator(part, newline).sum()) for part in features]
        known[sizes] = [_Item(None, *pair) for pair in zip(counts, ends, strict=True)]
    return known[sizes]


def _ends_without_weights(
    core: Any, kind: _Kind, given: Mapping[str, Any], counts: Sequence[int]
) -> list[int]:
    """How many tokens fewer each image has if rows have no end, in a model that cannot compare."""
    view = shallow_copy(core)
    view._parameters = {**core._parameters, "image_newline": None}
    with torch.no_grad(), ShapesOnly():
        features = features_of(getattr(view, kind.encode)(**given, return_dict=True))
    return [count - len(part) for count, part in zip(counts, features, strict=True)]


# *** whose pixels are whose ***


def _media(model: PreTrainedModel, kind: _Kind) -> frozenset[str]:
    """Inputs about the images, pixels and all."""
    if kind is _IMAGES:
        return size_inputs(model) | {kind.pixels}
    takes = inspect.signature(getattr(model.base_model, kind.encode)).parameters
    return frozenset(takes) & frozenset(inspect.signature(type(model).forward).parameters)


def encoder_inputs(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What a call gives to the methods that encode images and videos, by their names."""
    return {
        kind.encode: {
            name: inputs[name] for name in sorted(_media(model, kind)) if name in inputs
        }
        for kind in (_IMAGES, _VIDEOS)
        if kind.pixels in inputs
    }


def media_of_rows(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    prompts: Sequence[PromptImages],
    rows: Sequence[int],
) -> dict[str, Any]:
    """The inputs about images, for some prompts.

    Args:
        model: The model.
        inputs: Arguments of its forward.
        prompts: What every prompt shows.
        rows: The prompts to take, in their new order; one may come more than once.

    Returns:
        The inputs about images by name; those of a kind that no such prompt has are None.

    Raises:
        ValueError: If it cannot be told which pixels belong to which image.
    """
    taken: dict[str, Any] = {}
    for kind in (_IMAGES, _VIDEOS):
        if kind.pixels not in inputs:
            continue
        spans = [
            (row, *next(((a, b) for one, a, b in prompts[row].items if one is kind), (0, 0)))
            for row in rows
        ]
        total = sum(b - a for prompt in prompts for one, a, b in prompt.items if one is kind)
        table = _table(model, inputs, kind)
        for name in (_media(model, kind) | kind.others) & inputs.keys():
            value = inputs[name]
            if not any(b > a for _, a, b in spans):
                taken[name] = None
            elif isinstance(value, (Tensor, list)) and len(value):
                units = _units(name, value, spans, total, table, len(prompts))
                taken[name] = value[units] if isinstance(value, Tensor) else [
                    value[unit] for unit in units
                ]
    return taken


def _units(
    name: str,
    value: Tensor | list[Any],
    spans: Sequence[tuple[int, int, int]],
    images: int,
    table: Tensor | None,
    batch: int,
) -> list[int]:
    """Which entries of the leading axis belong to some prompts (row, first image, end)."""
    if len(value) == images:
        return [image for _, a, b in spans for image in range(a, b)]
    areas = [] if table is None else table.prod(dim=-1).tolist()
    if len(value) == sum(areas):
        ends = [sum(areas[:image]) for image in range(len(areas) + 1)]
        return [unit for _, a, b in spans for unit in range(ends[a], ends[b])]
    if len(value) == batch:
        return [row for row, _, _ in spans]
    raise ValueError(
        f"{name} has {len(value)} entries for {images} images in {batch} prompts, so it cannot be "
        "told which belong to which prompt. Pass prompts with different images one by one."
    )
