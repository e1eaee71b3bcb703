"""Find the images and videos of a batch, and the prompts that they belong to.

transformers gives the pixels of a batch as flat lists: of images, of their tiles, of their patches,
with tables of the size of each image. `items` counts the visual tokens of each. Here they are
found in the prompts, by their placeholders. `batch.media_of_rows` takes them apart again where
prompts go separate ways.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deos_fx.inputs.items import IMAGES, VIDEOS, Item, Kind, given_kinds, items_of, token_of
from deos_fx.inputs.packed import packed_by
from deos_fx.models.facts import ModelFacts
from deos_fx.models.families import MARKS
from deos_fx.tokens.layout import PromptLayout
from deos_fx.tokens.positions import last_token
from deos_fx.words import counted

__all__ = ["PromptImages", "are_written_alike", "images_of_prompts", "padding_of", "placeholders"]


@dataclass(frozen=True)
class PromptImages:
    """The images and videos of one prompt.

    Attributes:
        layout: Its visual tokens; None for a prompt of text alone.
        items: For each kind in the prompt, the number of its first image and one past its last.
        starts: Kind, number and first position in the prompt of every image.
    """

    layout: PromptLayout | None
    items: tuple[tuple[Kind, int, int], ...]
    starts: tuple[tuple[Kind, int, int], ...] = ()

    @property
    def alike(self) -> Hashable:
        """Return a key that prompts share if one graph serves them: their layout and inputs."""
        return self.layout, tuple(kind.pixels for kind, _, _ in self.items)


def padding_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the flags [B, N] of real tokens in the inputs of a call; None if there are none."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def images_of_prompts(facts: ModelFacts, inputs: Mapping[str, Any]) -> list[PromptImages]:
    """Find the images and videos of every prompt of a batch.

    1. Flag the placeholders of each kind, and count the tokens of each image and video.
    2. Walk through the prompts: each run of placeholders takes the next image of its kind.
    3. Check that every image was taken.

    Args:
        facts: The facts of the model.
        inputs: Arguments of its forward, with pixels.

    Returns:
        One description for each prompt.

    Raises:
        ValueError: If images and placeholders do not match, placeholders of images and of videos
            cannot be told apart, or packed samples are refused (see `packed_by`).
    """
    # 1. Placeholders and images.
    places = _places(facts, inputs)
    # The id that stands in the prompts; without any placeholder, that of the config.
    tokens = {
        kind: int(_ids(inputs)[flags][0]) if flags.any() else token_of(facts, kind)
        for kind, flags in places.items()
    }
    items = {
        kind: items_of(facts, inputs, kind, flags.sum(dim=1).tolist())
        for kind, flags in places.items()
    }
    # 2. Prompts and their images. One iterator serves all prompts, since the lists are flat.
    waiting = {kind: iter(enumerate(given)) for kind, given in items.items()}
    # The kind of every token as a number: 0 for text, kinds from 1.
    numbers: Any = sum(number * flags for number, flags in enumerate(places.values(), 1))
    packed = packed_by(inputs, numbers > 0)
    last = last_token(inputs["input_ids"], padding_of(inputs))[:, 0].tolist()
    found = []
    for row, of_row in enumerate(numbers.tolist()):
        kinds = [list(places)[number - 1] for number in of_row if number]
        shown = list(_shown(kinds, tokens, waiting, row))
        prompt = _of_prompt(tokens, shown, ends=of_row[last[row]] > 0, packed=packed)
        found.append(replace(prompt, starts=_starts(of_row, shown)))
    # 3. Images that no prompt shows.
    for kind, rest in waiting.items():
        total, left = len(items[kind]), sum(1 for _ in rest)
        if left:
            raise ValueError(
                f"{kind.pixels} has {counted(total, 'image')}, but input_ids has placeholders "
                f"(token id {tokens[kind]}) for {total - left}. Make both with the same call of "
                "the model's processor."
            )
    return found


def are_written_alike(facts: ModelFacts, inputs: Mapping[str, Any]) -> bool:
    """Return whether the inputs have both images and videos, and one placeholder stands for both.

    The model itself cannot read such inputs in one call.
    """
    if len(given_kinds(inputs)) < 2:
        return False
    places = _own_places(facts, _ids(inputs))
    if places is None:
        # Case: the model's own code cannot be asked; the config tells.
        return facts.image_token == facts.video_token
    return bool((places[IMAGES] & places[VIDEOS]).any())


def placeholders(facts: ModelFacts, inputs: Mapping[str, Any]) -> Tensor:
    """Flag every placeholder [B, N] of a call, of images or of videos."""
    ids, video = _ids(inputs), facts.video_token
    images = ids == (1 if MARKS in inputs else facts.image_token)
    return images if video is None else images | (ids == video)


def _ids(inputs: Mapping[str, Any]) -> Tensor:
    """Return the input [B, N] that says where images are: ids, or the flags of some models."""
    return inputs.get(MARKS, inputs["input_ids"])


def _places(facts: ModelFacts, inputs: Mapping[str, Any]) -> dict[Kind, Tensor]:
    """Flag the placeholders [B, N] of each kind that has pixels among the inputs."""
    ids, kinds = _ids(inputs), given_kinds(inputs)
    if MARKS in inputs:
        return {IMAGES: ids == 1}
    places = {kind: ids == token_of(facts, kind) for kind in kinds}
    own = _own_places(facts, ids)
    # The model's own code takes precedence over a comparison of ids.
    if own is not None:
        places = {kind: own[kind] for kind in kinds}
    # Case: every placeholder is of one kind only.
    if len(kinds) == 1 or not (places[IMAGES] & places[VIDEOS]).any():
        return places
    return _told_apart(facts, places, inputs.get("mm_token_type_ids"))


def _told_apart(
    facts: ModelFacts, places: Mapping[Kind, Tensor], marks: Tensor | None
) -> dict[Kind, Tensor]:
    """Tell the same placeholder of images and of videos apart by the marks of the processor.

    Args:
        facts: The facts of the model.
        places: Flags [B, N] of the placeholders of each kind.
        marks: ``mm_token_type_ids`` [B, N].

    Raises:
        ValueError: If there are no such marks, or a prompt has both an image and a video.
    """
    apart = {}
    for kind, flags in places.items():
        found = None if marks is None else flags & (marks == kind.marked)
        if found is None or not found.any():
            raise ValueError(
                f"{facts.name} has one placeholder for images and videos, and "
                f"mm_token_type_ids does not tell those of {kind.pixels} (where it is "
                f"{kind.marked}) from others. Pass the mm_token_type_ids that the model's "
                "processor returns, or prompts with images and prompts with videos one by one."
            )
        apart[kind] = found
    # Each kind would fill the same placeholders from the start of the prompt.
    both = apart[IMAGES].any(dim=1) & apart[VIDEOS].any(dim=1)
    if both.any():
        raise ValueError(
            f"Prompt {int(both.int().argmax())} of the batch has an image and a video, which "
            f"{facts.name} writes over each other: it has one placeholder for both. Give "
            "the frames of the video as images."
        )
    return apart


def _own_places(facts: ModelFacts, input_ids: Tensor) -> dict[Kind, Tensor] | None:
    """Flag where the model's own code puts each kind, [B, N]; None if it cannot be asked."""
    find: Any = getattr(facts.model.base_model, "get_placeholder_mask", None)
    if find is None:
        return None
    needed = {
        name
        for name, parameter in inspect.signature(find).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    # Case: the method needs further arguments.
    if needed != {"input_ids", "inputs_embeds"}:
        return None
    # Of the embeddings, the method reads only the device and the number.
    masks = find(input_ids, inputs_embeds=input_ids[..., None])
    if not isinstance(masks, tuple):
        return None
    return {
        kind: mask.reshape(input_ids.shape)
        for kind, mask in zip((IMAGES, VIDEOS), masks, strict=False)
    }


def _shown(
    kinds: Sequence[Kind],
    tokens: Mapping[Kind, int],
    waiting: Mapping[Kind, Iterator[tuple[int, Item]]],
    row: int,
) -> Iterator[tuple[Kind, int, Item]]:
    """Yield the kind, number and size of each image of a prompt, in the order of placeholders.

    Args:
        kinds: The kind of each placeholder of the prompt, in order.
        tokens: The id of each kind's placeholder.
        waiting: The numbered images of each kind that no earlier prompt has shown.
        row: Number of the prompt, for errors.

    Raises:
        ValueError: If images and placeholders do not match.
    """
    place = 0
    while place < len(kinds):
        # The next image of the kind must find all its placeholders here, in one run.
        kind = kinds[place]
        number, item = next(waiting[kind], (0, None))
        if item is None or tuple(kinds[place : place + item.tokens]) != (kind,) * item.tokens:
            raise ValueError(
                f"Prompt {row} of the batch has {counted(len(kinds), 'image placeholder')} (token "
                f"id {tokens[kind]}), and not those of the images given. Make input_ids and pixels "
                "with the same call of the model's processor."
            )
        yield kind, number, item
        place += item.tokens


def _starts(
    of_row: Sequence[int], shown: Sequence[tuple[Kind, int, Item]]
) -> tuple[tuple[Kind, int, int], ...]:
    """Return kind, number and first position of each image, given the kinds of all tokens."""
    positions = [position for position, number in enumerate(of_row) if number]
    firsts = itertools.accumulate((item.tokens for _, _, item in shown), initial=0)
    return tuple(
        (kind, number, positions[first])
        for (kind, number, _), first in zip(shown, firsts, strict=False)
    )


def _of_prompt(
    tokens: Mapping[Kind, int],
    shown: Sequence[tuple[Kind, int, Item]],
    *,
    ends: bool,
    packed: str,
) -> PromptImages:
    # Images of a prompt are consecutive in the flat list of their kind, so two numbers tell which.
    items = []
    for kind in tokens:
        numbers = [number for other, number, _ in shown if other is kind]
        if numbers:
            items.append((kind, numbers[0], numbers[-1] + 1))
    # Case: a prompt of text alone.
    if not shown:
        return PromptImages(None, ())
    # Only the placeholders of this prompt: one id, or several if both kinds are in it.
    own = tuple(dict.fromkeys(tokens[kind] for kind, _, _ in items))
    placed = all(item.grids is not None for _, _, item in shown)
    # An image whose rows and columns are not known counts as one row.
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
        pictures=_pictures_of(shown),
        packed=packed,
    )
    return PromptImages(layout, tuple(items))


def _pictures_of(shown: Sequence[tuple[Kind, int, Item]]) -> tuple[tuple[int, int], ...]:
    """Return the pictures of all images of a prompt; none if those of one are not known."""
    # The only end of a video's tokens says nothing of its frames.
    pictures = [item.pictures if kind is IMAGES else () for kind, _, item in shown]
    return tuple(itertools.chain(*pictures)) if all(pictures) else ()
