"""Group questions into the batches of a search, whose last quarter stands for all of them."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deos_fx.data import Record

__all__ = ["alike"]


def alike(
    model: PreTrainedModel,
    processors: Sequence[Any],
    records: Sequence[Record],
    size: int,
    seed: int,
) -> list[list[Record]]:
    """Group records for batches of prompts whose images are alike, as a search needs them.

    A search holds back the last quarter of the batches. So records are shuffled, those about the
    same images together, and every kind of images has its share of the last batches.

    Args:
        model: The model.
        processors: Its processor, or one for each scale of images: they are alike at all of them.
        records: The questions.
        size: Prompts of a batch; of each kind of images, the last batch may be smaller.
        seed: Seed of the order.

    Returns:
        The records of each batch.

    Raises:
        ValueError: If the images of a question become different numbers of visual tokens.
    """
    from deos_fx.data import batches
    from deos_fx.inputs.call import Call
    from deos_fx.models.facts import facts_of
    from deos_fx.passes.search.batches import check_one_size

    facts = facts_of(model)
    kinds: dict[tuple[Hashable, ...], list[Record]] = {}
    for record in _shuffled(records, seed):
        # What an image becomes, the processor alone knows.
        asked = [replace(record, answer=None)]
        calls = [Call.of(facts, next(batches(own, asked, 1))) for own in processors]
        prompts = [call.prompts[0] for call in calls]
        for prompt in prompts:
            if prompt.layout is not None:
                check_one_size(prompt.layout, record.where)
        kinds.setdefault(tuple(prompt.alike for prompt in prompts), []).append(record)
    placed = [pair for kind in kinds.values() for pair in _placed(kind, size)]
    return [group for _, group in sorted(placed, key=itemgetter(0))]


def _shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    """Return records in a random order, in which those about the same images stay together."""
    about: dict[Hashable, list[Record]] = {}
    for i, record in enumerate(records):
        # Images that are loaded already have no name to know them by.
        named = all(isinstance(source, (Path, bytes)) for source in record.images)
        about.setdefault(tuple(record.images) if named else i, []).append(record)
    groups = [*about.values()]
    random.Random(seed).shuffle(groups)
    return [record for group in groups for record in group]


def _placed(kind: list[Record], size: int) -> list[tuple[float, list[Record]]]:
    """Cut the records of one kind into batches, each with its place in the order of all, 0 to 1."""
    groups = [kind[start : start + size] for start in range(0, len(kind), size)]
    return [((i + 0.5) / len(groups), group) for i, group in enumerate(groups)]
