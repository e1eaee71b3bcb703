"""Show what a model sees of a record: its tokens as text, and which of them are the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from deos_fx.data.batches import batches
from deos_fx.data.images import open_image
from deos_fx.data.record import IMAGE_MARK, Record

__all__ = ["Piece", "Preview", "preview"]


@dataclass(frozen=True)
class Piece:
    """Tokens of one kind that follow each other.

    Attributes:
        kind: ``text``, ``image`` or ``answer``.
        text: What they say; of an image, its placeholder once.
        tokens: Their number.
    """

    kind: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Preview:
    """What a model sees of a record.

    Attributes:
        record: The record.
        pieces: Its tokens, in order.
        sizes: Width and height of each image, upright, before the processor resizes it.
    """

    record: Record
    pieces: Sequence[Piece]
    sizes: Sequence[tuple[int, int]]

    def tokens(self, *kinds: str) -> int:
        """Return the number of tokens of some kinds, or of all."""
        return sum(piece.tokens for piece in self.pieces if not kinds or piece.kind in kinds)


def preview(
    processor: Any,
    record: Record,
    image_token: int,
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Preview:
    """Turn a record into inputs of a model, and these back into text.

    Args:
        processor: The model's processor.
        record: The record.
        image_token: The id that stands for a visual token in the model's inputs.
        read: Returns inputs as the model reads them, with the images that it puts in front of the
            text itself.

    Raises:
        ValueError: If an image cannot be read, or the record cannot be rendered.
    """
    inputs = read(next(batches(processor, [record], 1)))
    (ids,) = inputs["input_ids"].tolist()
    labels = inputs["labels"][0].tolist() if "labels" in inputs else [-100] * len(ids)

    def kind(place: int) -> str:
        if ids[place] == image_token:
            return "image"
        return "text" if labels[place] == -100 else "answer"

    pieces = []
    for name, places in groupby(range(len(ids)), kind):
        run = [ids[place] for place in places]
        # A negative id is no token's.
        known = run[:1] if name == "image" else run
        text = processor.tokenizer.decode(known) if known[0] >= 0 else IMAGE_MARK
        pieces.append(Piece(name, text, len(run)))
    sizes = [open_image(source, record.where).size for source in record.images]
    return Preview(record, pieces, sizes)
