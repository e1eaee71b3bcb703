"""Rows of patches, and the groups of them that are left of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deos_fx import tokens
from deos_fx.operator.gather import listed

__all__ = ["Alike", "Part", "of_groups", "one_by_one", "parts_of", "put_in_rows"]


class Alike:
    """What is left of the images of one size.

    Args:
        images: Numbers of these images in a prompt.
        tokens: Numbers [I, V] of their visual tokens among those of the batch.
        cells: Image, row and column [V, 3] of the tokens of one of them.
        groups: Numbers [T, s] of the patches of all tokens.

    Attributes:
        mass: Masses [I, K]; None while every mass is 1.
        spans: The first and the last patch of each image.
    """

    def __init__(
        self, images: Sequence[int], tokens: Tensor, cells: Tensor, groups: Tensor
    ) -> None:
        self.images = images
        self.tokens = tokens
        self.cells = cells
        own = groups[tokens].flatten(1)
        self.spans = [*zip(own.amin(dim=1).tolist(), own.amax(dim=1).tolist(), strict=True)]
        self.mass: Tensor | None = None


class Part(NamedTuple):
    """Rows that have equally many patches left.

    Attributes:
        rows: Their numbers [r]; None if they are all rows.
        places: [r, M] places of the patches that are left, ascending.
    """

    rows: Tensor | None
    places: Tensor


def put_in_rows(whole: Tensor, rows: Tensor | None, index: Tensor, made: Tensor) -> Tensor:
    """Write values [r, M, k] of some patches of some rows into those of all, [R, P, k]."""
    if rows is None:
        return tokens.put(whole, index, made)
    return whole.index_copy(0, rows, tokens.put(whole[rows], index, made))


def of_groups(values: Tensor, share: float) -> Tensor:
    """Return features of groups, of those [I, V, s, k] of their patches.

    Attention is a number for each patch, and its mean that of the group: [I, V]. It is a mean over
    all queries of a row, of which those in other images give nothing. Keys lie side by side, as
    hidden states do: [I, V, s k].

    Args:
        values: Features of the patches.
        share: Share of the queries that are in the same image.
    """
    return values.mean(dim=(2, 3)) / share if values.shape[-1] == 1 else values.flatten(2)


def one_by_one(parts: Sequence[Part]) -> list[Part]:
    """Divide parts into single rows."""
    return [
        Part(places.new_tensor([row]) if rows is None else rows[row : row + 1], one[None])
        for rows, places in parts
        for row, one in enumerate(places)
    ]


def parts_of(left: Tensor, counts: Sequence[int]) -> list[Part]:
    """Divide rows by how many of their patches are left.

    Args:
        left: Flags [R, P], 0 or 1.
        counts: How many are left of each row.
    """
    parts = []
    for count in dict.fromkeys(counts):
        if count == 0:
            # Case: rows of which nothing is left, so that no block runs on them.
            continue
        rows = [i for i, other in enumerate(counts) if other == count]
        own = left if len(rows) == len(counts) else left[rows]
        index = listed(own, count).sort(dim=1).values
        which = None if own is left else torch.tensor(rows, device=left.device)
        parts.append(Part(which, index))
    return parts
