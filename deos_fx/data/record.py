"""A question about images, as a row of a file says it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from deos_fx.words import counted

__all__ = ["IMAGE_MARK", "ImageSource", "Message", "Record", "parts_of"]

ImageSource: TypeAlias = Path | bytes | Image.Image
"""A file, its contents, or an image that is loaded already."""

Message: TypeAlias = Mapping[str, Any]
"""A turn of a chat: ``role``, and as ``content`` a list of parts, each an image or a text."""

IMAGE_MARK = "<image>"
"""Says in a text where an image goes, whatever the model's own placeholder is called."""


@dataclass(frozen=True)
class Record:
    """A question about one or more images.

    Attributes:
        image: The image or the images.
        prompt: The question. ``<image>`` in it says where an image goes; by default images come
            first.
        answer: The answer, if given.
        kind: The kind of question, if given, by which comparisons count right answers.
        chat: The turns of a chat up to the answer; empty for a single question. `prompt` is then
            the text of the last one.
        extra: Other entries of the row.
        where: Its file and line, for messages.

    Raises:
        ValueError: If there is an answer without a word.
    """

    image: ImageSource | Sequence[ImageSource] = field(repr=False)
    prompt: str
    answer: str | None = None
    kind: str = ""
    chat: Sequence[Message] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        # With a chat template, the end of the turn would be all that is learned.
        if self.answer is not None and not self.answer.strip():
            raise ValueError(
                f"{self.where or repr(self.prompt)}: the answer is empty; write one, or leave out "
                "the row, or the answers of all rows"
            )

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """Return all images, in order."""
        if isinstance(self.image, (Path, bytes, Image.Image)):
            return (self.image,)
        return tuple(self.image)

    def messages(self, image_token: str = IMAGE_MARK) -> list[Message]:
        """Return the conversation up to the answer.

        Args:
            image_token: The model's own placeholder, which marks the place of an image, too.

        Raises:
            ValueError: If it does not have a place for each image.
        """
        turns = list(self.chat)
        if not turns:
            parts = parts_of(self.prompt, image_token)
            if not any(part["type"] == "image" for part in parts):
                parts = [{"type": "image"} for _ in self.images] + parts
            turns = [{"role": "user", "content": parts}]
        places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if places != len(self.images):
            raise ValueError(
                f"{self.where or repr(self.prompt)}: the text has places for "
                f"{counted(places, 'image')}, but comes with {len(self.images)}; write "
                f"{IMAGE_MARK} once for each, or not at all"
            )
        return turns


def parts_of(text: str, image_token: str = IMAGE_MARK) -> list[dict[str, str]]:
    """Split a text at its marks of images into parts of a message.

    Spaces between an image and words on one side only are left out: what stands between an image
    and the question is the template's.
    """
    marks = "|".join(re.escape(mark) for mark in {IMAGE_MARK, image_token})
    pieces = re.split(f"({marks})", text)
    # Every second piece is a mark; the words are those from the first to the last other one.
    words = [i for i in range(0, len(pieces), 2) if pieces[i].strip()]
    parts = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append({"type": "image"})
        elif i in words:
            piece = piece.lstrip() if i == words[0] else piece
            piece = piece.rstrip() if i == words[-1] else piece
            parts.append({"type": "text", "text": piece})
    return parts
