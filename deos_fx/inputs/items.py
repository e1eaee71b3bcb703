"""Find the images and videos of a call: the inputs that carry them, and their visual tokens."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deos_fx.models.encoding import encoded_by
from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import ENCODERS, PIXELS, READ, WRITER
from deos_fx.models.groups import key_of_sizes
from deos_fx.models.shapes_only import count_visual_tokens, on_shapes
from deos_fx.models.views import shallow_copy
from deos_fx.recent import Recent
from deos_fx.tokens.positions import is_separator
from deos_fx.words import counted

__all__ = [
    "IMAGES",
    "VIDEOS",
    "Item",
    "Kind",
    "beside",
    "encoding",
    "given_kinds",
    "has_images",
    "image_inputs",
    "items_of",
    "media",
    "table_of_sizes",
    "token_of",
]


# *** kinds of media ***


@dataclass(frozen=True)
class Kind:
    """A kind of media: images or videos.

    Attributes:
        pixels: The input with their pixels.
        encode: The method of the model's core that turns them into features.
        marked: The value of ``mm_token_type_ids`` at their placeholders.
        words: Parts of the names of further inputs about them that the encoder does not take.
    """

    pixels: str
    encode: str
    marked: int
    words: tuple[str, ...] = ()


IMAGES = Kind(PIXELS[0], "get_image_features", 1, ("num_crops",))

VIDEOS = Kind(PIXELS[1], "get_video_features", 2, ("video", "second_per_grid"))


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Return whether the inputs of a call have pixels of images or videos."""
    return any(name in inputs for name in PIXELS)


def image_inputs(facts: ModelFacts, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that images and videos come in: their pixels and sizes."""
    # Sorted, so that the order of the inputs does not depend on that of a set.
    names = sorted(frozenset().union(*(beside(facts, kind) for kind in given_kinds(inputs))))
    return {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}


def given_kinds(inputs: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Return the kinds that have pixels among the inputs of a call."""
    return tuple(kind for kind in (IMAGES, VIDEOS) if kind.pixels in inputs)


def token_of(facts: ModelFacts, kind: Kind) -> int:
    """Return the id of a kind's placeholder.

    Raises:
        ValueError: If the config names none.
    """
    token = facts.image_token if kind is IMAGES else facts.video_token
    if token is None:
        raise ValueError(
            f"{kind.pixels} was given, but the config of {facts.name} names no "
            "placeholder for videos (video_token_id). Give the frames as images."
        )
    return token


def media(facts: ModelFacts, kind: Kind) -> frozenset[str]:
    """Return the names of a kind's inputs that model and encoder both take, pixels included."""
    # Case: images. The tower may take tensors that get_image_features hands on without naming them,
    # so the facts look at both.
    if kind is IMAGES:
        return facts.size_inputs | {kind.pixels}
    takes = facts.encoders.get(kind.encode, frozenset())
    return takes.intersection(facts.arguments.parameters) | {kind.pixels}


def beside(facts: ModelFacts, kind: Kind) -> frozenset[str]:
    """Return `media` and the inputs about a kind that the encoder does not read.

    Seconds per frame are such an input, on which positions depend and features do not, and so are
    numbers of crops, which nothing reads.
    """
    names = facts.arguments.parameters
    others = (name for name in names if any(word in name for word in kind.words))
    return media(facts, kind) | frozenset(others)


def encoding(
    facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind
) -> tuple[str, dict[str, Any]]:
    """Return the name of the core's method that encodes a kind, and its arguments in a call."""
    given = {name: inputs[name] for name in sorted(media(facts, kind) | READ) if name in inputs}
    if kind.encode in facts.encoders:
        return kind.encode, given
    if WRITER in facts.encoders:
        return WRITER, given | {"input_ids": inputs["input_ids"]}
    # Case: a model without a method for videos, which encodes their frames as images.
    pixels = given.pop(kind.pixels)
    return IMAGES.encode, given | {IMAGES.pixels: pixels}


# *** visual tokens of each image and each video ***


_ENCODED: weakref.WeakKeyDictionary[ModelFacts, Recent[Hashable, list[Item]]]
_ENCODED = weakref.WeakKeyDictionary()

_SHARES: weakref.WeakKeyDictionary[ModelFacts, Recent[tuple[Kind, int], int]]
_SHARES = weakref.WeakKeyDictionary()

# Tokens that the encoder makes of a set of sizes.
_MADE: weakref.WeakKeyDictionary[ModelFacts, Recent[tuple[Kind, Hashable], int]]
_MADE = weakref.WeakKeyDictionary()

# Tokens that it makes of a tile of some height and width.
_TILES: weakref.WeakKeyDictionary[ModelFacts, Recent[tuple[int, int], int]]
_TILES = weakref.WeakKeyDictionary()

# Sets of sizes that are remembered for each model; a limit, since new images may have new sizes.
_SETS_OF_SIZES = 1024


class Item(NamedTuple):
    """One image or one video, and the placeholders that stand for it.

    Attributes:
        grids: Rows and columns of each of its frames; None if that is not known.
        tokens: The number of its placeholders, ends of rows included.
        ends: How many of these stand for the end of a row.
        closed: Whether the last one stands for the end of a row.
        pictures: Where its tokens lie if it is one image, but not in one grid: rows and columns of
            the whole image, then those of its tiles put together. Empty if that is not known.
    """

    grids: tuple[tuple[int, int], ...] | None
    tokens: int
    ends: int = 0
    closed: bool = False
    pictures: tuple[tuple[int, int], ...] = ()


def items_of(
    facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind, of_rows: list[int]
) -> list[Item]:
    """Return all images, or all videos, of a batch.

    The ways to count their tokens, the cheapest first:

    1. All images of the model have one size.
    2. A table has the size of every image, or images are divided into tiles of one size: tokens are
       in proportion to these.
    3. The model's own encoder is run on shapes.
    4. Nothing assigns tokens to single images, so those of a prompt count as one image.

    Args:
        facts: The facts of the model.
        inputs: Arguments of its forward.
        kind: What to count.
        of_rows: Number of placeholders of this kind in each prompt.
    """
    pixels, placeholders = inputs[kind.pixels], sum(of_rows)
    # Case 1: all images have one size.
    if kind is IMAGES and not facts.sizes_vary:
        rows, columns = facts.grid
        # A non-square count may include class or register tokens, so no rows and columns are
        # assumed.
        grids = ((rows, columns),) if rows == columns else None
        return [Item(grids, rows * columns)] * math.prod(pixels.shape[:-3])
    if facts.encoders.keys().isdisjoint(ENCODERS):
        # Case 4: what is encoded is known only as a part of the prompt.
        return [Item(None, tokens) for tokens in of_rows if tokens]
    table = table_of_sizes(facts, inputs, kind)
    found = None
    # Case 2: sizes or tiles. These know nothing of the ends of rows, so not if there are any.
    if getattr(facts.model.base_model, "image_newline", None) is None:
        if table is not None:
            share = _share(facts, inputs, kind, int(table.prod(dim=-1).sum()), placeholders)
            found = _of_table(table.tolist(), share)
        elif kind is IMAGES and pixels.ndim == 5 and len(pixels) == len(of_rows):
            found = _of_tiles(facts, inputs, placeholders)
    # Case 3: the encoder.
    found = found or _encoded(facts, inputs, kind)
    if found and kind is VIDEOS:
        found = _of_frames(found, *pixels.shape[:2]) if pixels.ndim == 5 else found
        found = found and _without_left_out(facts, inputs, found)
    # Case 4: nothing tells images apart.
    return found or [Item(None, tokens) for tokens in of_rows if tokens]


def table_of_sizes(facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind) -> Tensor | None:
    """Return the input with the (frames,) height and width of every image; None if absent."""
    sizes = [inputs[name] for name in sorted(media(facts, kind)) if name in inputs]
    tables = (size for size in sizes if isinstance(size, Tensor) and size.ndim == 2)
    return next((table for table in tables if table.shape[1] in (2, 3)), None)


def _share(
    facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind, area: int, placeholders: int
) -> int:
    """Return how many patches or pixels one token stands for; 0 if no number fits.

    The placeholders tell. With too few of them the number would be wrong, and images would enter
    the prompt in part: a number that is new is that of the model's encoder, in a run on shapes.

    Args:
        facts: The facts of the model.
        inputs: Arguments of its forward.
        kind: The kind of media.
        area: Patches or pixels of all images.
        placeholders: Number of their placeholders.
    """
    share, rest = divmod(area, placeholders) if placeholders else (0, area)
    known = _SHARES.setdefault(facts, Recent(_SETS_OF_SIZES))
    if not rest and known.get((kind, share)) is not None:
        return share
    method, given = encoding(facts, inputs, kind)

    def ask() -> int:
        with torch.no_grad(), on_shapes(facts.model.base_model) as run:
            features = encoded_by(run, method, given)
        parts = features if isinstance(features, (list, tuple)) else [features]
        return sum(math.prod(part.shape[:-1]) for part in parts)

    # Where placeholders stand for more than these tokens, such as ends of rows, no number fits.
    made = _MADE.setdefault(facts, Recent(_SETS_OF_SIZES))
    share, rest = divmod(area, made.find((kind, key_of_sizes(given)), ask))
    share = 0 if rest else share
    known.put((kind, share), share)
    return share


def _of_table(sizes: list[list[int]], share: int) -> list[Item] | None:
    """Return the images of a table of sizes, with `share` patches or pixels for each token.

    None if the sizes do not allow that.
    """
    if not share:
        return None
    found = []
    for size in sizes:
        tokens, rest = divmod(math.prod(size), share)
        if rest:
            return None
        found.append(Item(_grids(size, share), tokens))
    return found


def _grids(size: list[int], share: int) -> tuple[tuple[int, int], ...] | None:
    """Return rows and columns of every frame of an image of size (frames,) rows, columns.

    One token stands for `share` cells: a square of them, in one frame or in several. None if there
    is no such square.
    """
    # A size without frames is that of a single image.
    frames, (height, width) = size[0] if len(size) == 3 else 1, size[-2:]
    # The largest square that fits; a share beyond it spans several frames.
    for side in range(math.isqrt(share), 0, -1):
        depth, rest = divmod(share, side * side)
        if not (rest or height % side or width % side or frames % depth):
            return ((height // side, width // side),) * (frames // depth)
    return None


def _of_frames(found: Sequence[Item], videos: int, frames: int) -> list[Item] | None:
    """Join the items found, which may be single frames, into videos [videos, frames, C, H, W].

    None if the number of items is no multiple of the number of videos.
    """
    parts, rest = divmod(len(found), videos)
    if rest or not parts:
        return None
    joined = []
    for first in range(0, len(found), parts):
        own = found[first : first + parts]
        tokens, ends = sum(item.tokens for item in own), sum(item.ends for item in own)
        # The encoder gives a count alone; a frame gets a grid if its count is a square.
        of_frame, rest = divmod(tokens - ends, frames)
        side = math.isqrt(of_frame)
        whole = not rest and side * side == of_frame
        grids = ((side, side),) * frames if whole else None
        joined.append(Item(grids, tokens, ends, own[-1].closed))
    return joined


def _without_left_out(
    facts: ModelFacts, inputs: Mapping[str, Any], found: Sequence[Item]
) -> list[Item]:
    """Return the videos without the features that a model leaves out of the prompt.

    Such a model is given flags over the features of all videos: True for those that are used.
    """
    total = sum(item.tokens for item in found)
    named = (inputs.get(name) for name in sorted(beside(facts, VIDEOS)))
    # No name is common to these flags: they are recognised by their type and length.
    kept = next((x for x in named if isinstance(x, Tensor) and x.dtype == torch.bool), None)
    if kept is None or kept.shape != (total,) or kept.all():
        return list(found)
    parts = kept.split([item.tokens for item in found])
    return [Item(None, int(part.sum())) for part in parts]


def _of_tiles(facts: ModelFacts, inputs: Mapping[str, Any], placeholders: int) -> list[Item]:
    """Return the tiles [B, T, 3, H, W] of prompts; tiles that only pad a prompt are zero.

    How many tokens a tile of some size has is asked of the encoder, in a run on shapes.
    """
    pixels: Tensor = inputs[IMAGES.pixels]
    # A real tile that happens to be black counts as padding, as it does in the model's own code,
    # which takes the first of nothing but black ones.
    real = max(int((pixels != 0).flatten(2).any(dim=-1).sum()), 1)
    height, width = pixels.shape[-2:]
    known = _TILES.setdefault(facts, Recent(_SETS_OF_SIZES))
    tokens = known.find(
        (height, width),
        lambda: count_visual_tokens(facts.model, encoding(facts, inputs, IMAGES)[1]) // real,
    )
    if not tokens:
        # Case: the encoder cannot be asked, so the placeholders tell.
        tokens = placeholders // real
    if tokens * real != placeholders:
        raise ValueError(
            f"pixel_values has {counted(real, 'tile')} of images that are not zero, each of which "
            f"is {counted(tokens, 'token')}, and input_ids has "
            f"{counted(placeholders, 'placeholder')}. Make both with the same call of the model's "
            "processor."
        )
    # tokens = rows * columns with rows / columns = height / width, if these come out whole.
    rows = math.isqrt(tokens * height // width)
    whole = rows and rows * rows * width == tokens * height
    return [Item(((rows, tokens // rows),) if whole else None, tokens)] * real


def _encoded(facts: ModelFacts, inputs: Mapping[str, Any], kind: Kind) -> list[Item] | None:
    """Return the images as the model's own encoder divides them; it runs once per set of sizes.

    Only counts matter, so the encoder runs on shapes. Rows that end in a learned
    `image_newline` are the exception: it is recognised by its features, whatever the pixels are, so
    the encoder has to run on numbers. None if the encoder does not keep images apart.
    """
    core: Any = facts.model.base_model
    method, given = encoding(facts, inputs, kind)
    known = _ENCODED.setdefault(facts, Recent(_SETS_OF_SIZES))
    return (
        known.find((kind, key_of_sizes(given)), lambda: _run_encoder(core, method, given)) or None
    )


def _run_encoder(core: Any, method: str, given: Mapping[str, Any]) -> list[Item]:
    """Return the images as a method of a model's core divides them; none if it does not."""
    newline = getattr(core, "image_newline", None)
    shapes_suffice = newline is None or newline.is_meta
    encoder = on_shapes(core) if shapes_suffice else contextlib.nullcontext(core)
    with torch.no_grad(), encoder as run:
        features = encoded_by(run, method, given)
    apart = isinstance(features, (list, tuple))
    # Case: one tensor for all images together, or one for each patch.
    if not apart and (features is None or features.ndim < 3 or features.shape[1] == 1):
        return []
    counts = [math.prod(part.shape[:-1]) for part in features]
    # Case: rows do not end in a token.
    if newline is None:
        return [Item(None, count) for count in counts]
    # Case: the model has no weights, so the ends cannot be recognised by their features.
    if newline.is_meta:
        without = _ends_without_weights(core, method, given, counts)
        return [Item(None, n, ends, ends > 0) for n, ends in zip(counts, without, strict=True)]
    # Case: rows end in a token that is recognised.
    flags = [is_separator(part, newline).flatten() for part in features]
    return [
        Item(None, len(ends), int(ends.sum()), bool(ends[-1]), _pictures_by_ends(ends))
        for ends in flags
    ]


def _pictures_by_ends(ends: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the grids that an image's tokens lie in, given flags [N] of the ends of its rows.

    As LLaVA-NeXT packs them: the whole image, scaled to a square, without ends of rows; then the
    rows of its tiles put together, or a single end if there are none. Empty if they are packed
    otherwise, or in one row of tiles, which looks like a part of the square.
    """
    if not ends[-1]:
        return ()
    places = ends.nonzero().flatten()
    lengths = places.diff(prepend=places.new_tensor([-1])).sub(1).tolist()
    rows, columns = (len(lengths), lengths[1]) if len(lengths) > 1 else (0, 0)
    square = lengths[0] - columns
    side = math.isqrt(max(square, 0))
    if not side or side * side != square or any(length != columns for length in lengths[1:]):
        return ()
    return ((side, side), (rows, columns)) if rows else ((side, side),)


def _ends_without_weights(
    core: Any, method: str, given: Mapping[str, Any], counts: Sequence[int]
) -> list[int]:
    """Count the tokens that each image loses without ends of rows, in a model without weights."""
    # Encoders check image_newline for None and then append nothing.
    view = shallow_copy(core)
    view._parameters = {**core._parameters, "image_newline": None}
    with torch.no_grad(), on_shapes(view) as run:
        features = encoded_by(run, method, given)
    return [count - len(part) for count, part in zip(counts, features, strict=True)]
