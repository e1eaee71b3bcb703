"""The images and videos of a batch: how many visual tokens each has, and whose they are.

transformers gives the pixels of a batch as flat lists: of images, of their tiles, of their patches,
with tables that say how large each image is. Here they are counted, found in the prompts by their
placeholders, and taken apart again where prompts have to go separate ways.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx.inputs.packed import packed_by
from deos_fx.models.encoders import PIXELS, features_of
from deos_fx.models.facts import grid_of, image_token_of, size_inputs, sizes_vary, video_token_of
from deos_fx.models.families import PATCH_NUMBERS
from deos_fx.models.shapes_only import on_shapes
from deos_fx.models.views import shallow_copy
from deos_fx.recent import Recent
from deos_fx.tokens.index import is_separator, last_token
from deos_fx.tokens.layout import PromptLayout

__all__ = [
    "PromptImages",
    "are_written_alike",
    "encoder_inputs",
    "has_images",
    "image_inputs",
    "images_of_prompts",
    "media_of_rows",
    "padding_of",
    "placeholders",
]

_ENCODED: weakref.WeakKeyDictionary[PreTrainedModel, Recent[Hashable, list[_Item]]]
_ENCODED = weakref.WeakKeyDictionary()

# As many sets of sizes are remembered of a model: images may have ever new ones.
_SETS_OF_SIZES = 1024


@dataclass(frozen=True)
class _Kind:
    """Images, or videos.

    Attributes:
        pixels: The input with their pixels.
        encode: The method of the model's core that makes features of them.
        marked: What ``mm_token_type_ids`` is at their placeholders.
        words: What is in the names of inputs about them, beside those that the encoder takes.
    """

    pixels: str
    encode: str
    marked: int
    words: tuple[str, ...] = ()


_IMAGES = _Kind(PIXELS[0], "get_image_features", 1)
_VIDEOS = _Kind(PIXELS[1], "get_video_features", 2, ("video", "second_per_grid"))


class _Item(NamedTuple):
    """One image, or one video.

    Attributes:
        grids: Rows and columns of each of its frames; None if that is not known.
        tokens: Its placeholders, ends of rows included.
        ends: Those that stand for the end of a row.
        closed: Whether the last one does.
    """

    grids: tuple[tuple[int, int], ...] | None
    tokens: int
    ends: int = 0
    closed: bool = False


@dataclass(frozen=True)
class PromptImages:
    """What one prompt shows.

    Attributes:
        layout: Its visual tokens; None for a prompt of text alone.
        items: Of each kind, the first of its images and the one behind the last.
    """

    layout: PromptLayout | None
    items: tuple[tuple[_Kind, int, int], ...]

    @property
    def alike(self) -> Hashable:
        """The same for prompts that one graph is for: what they show, and in which inputs."""
        return self.layout, tuple(kind.pixels for kind, _, _ in self.items)


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether there are pixels of images or videos among the inputs of a call."""
    return any(name in inputs for name in PIXELS)


def padding_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The flags [B, N] of real tokens among the inputs of a call; None if there are none."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the inputs that images and videos come in: pixels, and how large each is."""
    names = sorted(frozenset().union(*(_beside(model, kind) for kind in _given(inputs))))
    return {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}


def images_of_prompts(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[PromptImages]:
    """What every prompt of a batch shows.

    Args:
        model: The model.
        inputs: Arguments of its forward, with pixels.

    Returns:
        One description for each prompt.

    Raises:
        ValueError: If images and placeholders do not match, or it cannot be told which
            placeholders are those of videos.
    """
    places = _places(model, inputs)
    tokens = {
        kind: int(inputs["input_ids"][flags][0]) if flags.any() else _token(model, kind)
        for kind, flags in places.items()
    }
    items = {
        kind: _items(model, inputs, kind, flags.sum(dim=1).tolist())
        for kind, flags in places.items()
    }
    waiting = {kind: iter(enumerate(given)) for kind, given in items.items()}
    # 0 is text, and kinds count from 1.
    numbers: Any = sum(number * flags for number, flags in enumerate(places.values(), 1))
    packed = packed_by(inputs, numbers > 0)
    last = last_token(inputs["input_ids"], padding_of(inputs))[:, 0].tolist()
    found = []
    for row, of_row in enumerate(numbers.tolist()):
        kinds = [list(places)[number - 1] for number in of_row if number]
        shown = list(_shown(kinds, tokens, waiting, row))
        found.append(_of_prompt(tokens, shown, ends=of_row[last[row]] > 0, packed=packed))
    for kind, rest in waiting.items():
        total, left = len(items[kind]), sum(1 for _ in rest)
        if left:
            raise ValueError(
                f"{kind.pixels} has {total} images, but input_ids has placeholders (token id "
                f"{tokens[kind]}) for {total - left}. Make both with the same call of the model's "
                "processor."
            )
    return found


def _given(inputs: Mapping[str, Any]) -> tuple[_Kind, ...]:
    return tuple(kind for kind in (_IMAGES, _VIDEOS) if kind.pixels in inputs)


def are_written_alike(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether there are images and videos among the inputs, and the model has one placeholder for
    both: it cannot read them in one call."""
    if len(_given(inputs)) < 2:
        return False
    places = _own_places(model, inputs["input_ids"])
    if places is None:
        return image_token_of(model) == video_token_of(model)
    return bool((places[_IMAGES] & places[_VIDEOS]).any())


def placeholders(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Flags of every placeholder in input_ids [B, N], of images or of videos."""
    video = video_token_of(model)
    images = input_ids == image_token_of(model)
    return images if video is None else images | (input_ids == video)


def _places(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[_Kind, Tensor]:
    """Flags [B, N] of the placeholders of each kind that has pixels among the inputs."""
    ids, kinds = inputs["input_ids"], _given(inputs)
    places = {kind: ids == _token(model, kind) for kind in kinds}
    own = _own_places(model, ids)
    if own is not None:
        places = {kind: own[kind] for kind in kinds}
    if len(kinds) == 1 or not (places[_IMAGES] & places[_VIDEOS]).any():
        return places
    return _told_apart(model, places, inputs.get("mm_token_type_ids"))


def _told_apart(
    model: PreTrainedModel, places: Mapping[_Kind, Tensor], marks: Tensor | None
) -> dict[_Kind, Tensor]:
    """Placeholders of images and of videos that are written alike, by how processors mark them.

    Args:
        model: The model.
        places: Flags [B, N] of the placeholders of each kind.
        marks: ``mm_token_type_ids`` [B, N].
    """
    apart = {}
    for kind, flags in places.items():
        found = None if marks is None else flags & (marks == kind.marked)
        if found is None or not found.any():
            raise ValueError(
                f"{type(model).__name__} has one placeholder for images and videos, and "
                f"mm_token_type_ids does not tell those of {kind.pixels} (where it is "
                f"{kind.marked}) from others. Pass the mm_token_type_ids that the model's "
                "processor returns, or prompts with images and prompts with videos one by one."
            )
        apart[kind] = found
    both = apart[_IMAGES].any(dim=1) & apart[_VIDEOS].any(dim=1)
    if both.any():
        raise ValueError(
            f"Prompt {int(both.int().argmax())} of the batch has an image and a video, which "
            f"{type(model).__name__} writes over each other: it has one placeholder for both. Give "
            "the frames of the video as images."
        )
    return apart


def _own_places(model: PreTrainedModel, input_ids: Tensor) -> dict[_Kind, Tensor] | None:
    """Where the model's own code puts images and videos; None if it cannot be asked."""
    find: Any = getattr(model.base_model, "get_placeholder_mask", None)
    if find is None:
        return None
    needed = {
        name
        for name, parameter in inspect.signature(find).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    if needed != {"input_ids", "inputs_embeds"}:
        return None
    # Of the embeddings it only asks where they are, and how many there are of them.
    masks = find(input_ids, inputs_embeds=input_ids[..., None])
    if not isinstance(masks, tuple):
        return None
    return {
        kind: mask.reshape(input_ids.shape)
        for kind, mask in zip((_IMAGES, _VIDEOS), masks, strict=False)
    }


def _token(model: PreTrainedModel, kind: _Kind) -> int:
    token = image_token_of(model) if kind is _IMAGES else video_token_of(model)
    if token is None:
        raise ValueError(
            f"{kind.pixels} was given, but the config of {type(model).__name__} names no "
            "placeholder for videos (video_token_id). Give the frames as images."
        )
    return token


def _shown(
    kinds: Sequence[_Kind],
    tokens: Mapping[_Kind, int],
    waiting: Mapping[_Kind, Iterator[tuple[int, _Item]]],
    row: int,
) -> Iterator[tuple[_Kind, int, _Item]]:
    """The images of a prompt, in the order of their placeholders, whose kinds are given: the kind,
    number and size of each."""
    place = 0
    while place < len(kinds):
        kind = kinds[place]
        number, item = next(waiting[kind], (0, None))
        if item is None or tuple(kinds[place : place + item.tokens]) != (kind,) * item.tokens:
            raise ValueError(
                f"Prompt {row} of the batch has {len(kinds)} image placeholders (token id "
                f"{tokens[kind]}), which are not those of the images given. Make input_ids and "
                "pixels with the same call of the model's processor."
            )
        yield kind, number, item
        place += item.tokens


def _of_prompt(
    tokens: Mapping[_Kind, int],
    shown: Sequence[tuple[_Kind, int, _Item]],
    *,
    ends: bool,
    packed: str,
) -> PromptImages:
    items = []
    for kind in tokens:
        numbers = [number for other, number, _ in shown if other is kind]
        if numbers:
            items.append((kind, numbers[0], numbers[-1] + 1))
    if not shown:
        return PromptImages(None, ())
    own = tuple(dict.fromkeys(tokens[kind] for kind, _, _ in items))
    placed = all(item.grids is not None for _, _, item in shown)
    grids = [grid for _, _, item in shown for grid in item.grids or ((1, item.tokens - item.ends),)]
    layout = PromptLayout(
        own[0] if len(own) == 1 else own,
        len(grids),
        grids[0],
        separators=sum(item.ends for _, _, item in shown),
        placed=placed,
        grids=tuple(grids) if len(set(grids)) > 1 else (),
        # The end of a row is never reduced.
        ends=ends and not shown[-1][2].closed,
        packed=packed,
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
    if found and kind is _VIDEOS:
        found = _of_frames(found, *pixels.shape[:2]) if pixels.ndim == 5 else found
        found = found and _without_left_out(model, inputs, found)
    return found or [_Item(None, tokens) for tokens in of_rows if tokens]


def _table(model: PreTrainedModel, inputs: Mapping[str, Any], kind: _Kind) -> Tensor | None:
    """The input with height and width, perhaps behind frames, of every image."""
    sizes = [inputs[name] for name in sorted(_media(model, kind)) if name in inputs]
    tables = (size for size in sizes if isinstance(size, Tensor) and size.ndim == 2)
    return next((table for table in tables if table.shape[1] in (2, 3)), None)


def _of_table(sizes: list[list[int]], placeholders: int) -> list[_Item] | None:
    """The images of a table of sizes: all have one token for as many patches or pixels.

    None if the placeholders are no such share of the sizes.
    """
    area = sum(math.prod(size) for size in sizes)
    share, rest = divmod(area, placeholders or area + 1)
    if rest or not share:
        return None
    found = []
    for size in sizes:
        tokens, rest = divmod(math.prod(size), share)
        if rest:
            return None
        found.append(_Item(_grids(size, share), tokens))
    return found


def _grids(size: list[int], share: int) -> tuple[tuple[int, int], ...] | None:
    """Rows and columns of every frame of an image of (frames,) rows and columns.

    One token stands for so many cells: a square of them, in one frame or in several. None if there
    is no such square.
    """
    frames, (height, width) = size[0] if len(size) == 3 else 1, size[-2:]
    for side in range(math.isqrt(share), 0, -1):
        depth, rest = divmod(share, side * side)
        if not (rest or height % side or width % side or frames % depth):
            return ((height // side, width // side),) * (frames // depth)
    return None


def _of_frames(found: Sequence[_Item], videos: int, frames: int) -> list[_Item] | None:
    """Videos of equally many frames [videos, frames, C, H, W], which may come as single frames.

    None if what was found is no multiple of them.
    """
    parts, rest = divmod(len(found), videos)
    if rest or not parts:
        return None
    joined = []
    for first in range(0, len(found), parts):
        own = found[first : first + parts]
        tokens, ends = sum(item.tokens for item in own), sum(item.ends for item in own)
        of_frame, rest = divmod(tokens - ends, frames)
        side = math.isqrt(of_frame)
        whole = not rest and side * side == of_frame
        grids = ((side, side),) * frames if whole else None
        joined.append(_Item(grids, tokens, ends, own[-1].closed))
    return joined


def _without_left_out(
    model: PreTrainedModel, inputs: Mapping[str, Any], found: Sequence[_Item]
) -> list[_Item]:
    """The videos without what flags over all their features leave out of the prompt."""
    total = sum(item.tokens for item in found)
    named = (inputs.get(name) for name in sorted(_beside(model, _VIDEOS)))
    kept = next((x for x in named if isinstance(x, Tensor) and x.dtype == torch.bool), None)
    if kept is None or kept.shape != (total,) or kept.all():
        return list(found)
    parts = kept.split([item.tokens for item in found])
    return [_Item(None, int(part.sum())) for part in parts]


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


def _encoded(model: PreTrainedModel, inputs: Mapping[str, Any], kind: _Kind) -> list[_Item] | None:
    """The images as the model's own encoder makes them; it runs once for each set of sizes.

    Only their number matters unless there are ends of rows, whose features are a parameter of the
    model, whatever the pixels are. None if the encoder does not keep images apart.
    """
    core: Any = model.base_model
    method, given = _encoding(model, inputs, kind)
    sizes = (
        kind,
        *(
            (name, tuple(value.shape), repr(value.tolist()) if value.ndim < 3 else "")
            for name, value in given.items()
            if isinstance(value, Tensor)
        ),
    )
    known = _ENCODED.setdefault(model, Recent(_SETS_OF_SIZES))
    return known.find(sizes, lambda: _run_encoder(core, method, given)) or None


def _run_encoder(core: Any, method: str, given: Mapping[str, Any]) -> list[_Item]:
    """The images as a method of a model's core makes them; none if it keeps them together."""
    newline = getattr(core, "image_newline", None)
    shapes_suffice = newline is None or newline.is_meta
    encoder = on_shapes(core) if shapes_suffice else contextlib.nullcontext(core)
    with torch.no_grad(), encoder as run:
        features = features_of(getattr(run, method)(**given, return_dict=True))
    apart = isinstance(features, (list, tuple))
    if not apart and (features is None or features.ndim < 3):
        return []
    counts = [math.prod(part.shape[:-1]) for part in features]
    if newline is None:
        ends = [(0, False)] * len(counts)
    elif newline.is_meta:
        without = _ends_without_weights(core, method, given, counts)
        ends = [(count, count > 0) for count in without]
    else:
        flags = [is_separator(part, newline).flatten() for part in features]
        ends = [(int(of_image.sum()), bool(of_image[-1])) for of_image in flags]
    return [_Item(None, n, *end) for n, end in zip(counts, ends, strict=True)]


def _ends_without_weights(
    core: Any, method: str, given: Mapping[str, Any], counts: Sequence[int]
) -> list[int]:
    """How many tokens fewer each image has if rows have no end, in a model that cannot compare."""
    view = shallow_copy(core)
    view._parameters = {**core._parameters, "image_newline": None}
    with torch.no_grad(), on_shapes(view) as run:
        features = features_of(getattr(run, method)(**given, return_dict=True))
    return [count - len(part) for count, part in zip(counts, features, strict=True)]


# *** whose pixels are whose ***


def _media(model: PreTrainedModel, kind: _Kind) -> frozenset[str]:
    """Inputs about the images, pixels and all."""
    if kind is _IMAGES:
        return size_inputs(model) | {kind.pixels}
    encode = getattr(model.base_model, kind.encode, None)
    takes = frozenset() if encode is None else frozenset(inspect.signature(encode).parameters)
    return takes & frozenset(inspect.signature(type(model).forward).parameters) | {kind.pixels}


def _beside(model: PreTrainedModel, kind: _Kind) -> frozenset[str]:
    """`_media`, and of videos what others than the encoder read: the seconds between frames."""
    names = inspect.signature(type(model).forward).parameters
    others = (name for name in names if any(word in name for word in kind.words))
    return _media(model, kind) | frozenset(others)


def encoder_inputs(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Names of the methods that encode the images and videos of a call, and what they are given."""
    return [_encoding(model, inputs, kind) for kind in _given(inputs)]


def _encoding(
    model: PreTrainedModel, inputs: Mapping[str, Any], kind: _Kind
) -> tuple[str, dict[str, Any]]:
    given = {name: inputs[name] for name in sorted(_media(model, kind)) if name in inputs}
    if hasattr(model.base_model, kind.encode):
        return kind.encode, given
    # Some models encode the frames of a video as images.
    pixels = given.pop(kind.pixels)
    return _IMAGES.encode, given | {_IMAGES.pixels: pixels}


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
    for kind in _given(inputs):
        spans = [
            (row, *next(((a, b) for one, a, b in prompts[row].items if one is kind), (0, 0)))
            for row in rows
        ]
        given = {name: inputs[name] for name in _beside(model, kind) & inputs.keys()}
        values = {name: value for name, value in given.items() if isinstance(value, (Tensor, list))}
        if not any(b > a for _, a, b in spans):
            taken |= dict.fromkeys(values)
            continue
        total = sum(b - a for prompt in prompts for one, a, b in prompt.items if one is kind)
        table = _table(model, inputs, kind)
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
    """How many frames each video has, if one of its inputs tells."""
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
    """Which entries of the leading axis belong to some prompts (row, first image, end)."""
    areas = [] if table is None else table.prod(dim=-1).tolist()
    share, rest = divmod(sum(areas), len(value))
    counts: list[Sequence[int]] = [[1] * images, areas, frames]
    if len(value) not in map(sum, counts):
        if len(value) == batch:
            return [row for row, _, _ in spans]
        if share and not rest and not any(area % share for area in areas):
            # Entries for tokens, which several patches make.
            counts.append([area // share for area in areas])
    for of_images in counts:
        if len(value) == sum(of_images):
            ends = list(itertools.accumulate(of_images, initial=0))
            return [unit for _, a, b in spans for unit in range(ends[a], ends[b])]
    raise ValueError(
        f"{name} has {len(value)} entries for {images} images in {batch} prompts, so it cannot be "
        "told which belong to which prompt. Pass prompts with different images one by one."
    )
