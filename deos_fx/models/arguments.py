"""Restrict the arguments of a vision block to some of its tokens.

Blocks are given tables of positions, masks and cumulative lengths beside the hidden states. Which
axis of an argument runs over the tokens follows from its shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deos_fx.errors import NoGroups

__all__ = ["Segments", "arguments_at", "axes_of", "have_no_rows", "hidden_first", "in_one_row"]


@dataclass(frozen=True)
class Segments:
    """The axis of cumulative lengths: tokens attend to those of their own segment alone.

    Attributes:
        borders: [0, ..., number of tokens].
        left: How many of the tokens in question come before each border, if that is known.
    """

    borders: tuple[int, ...]
    left: tuple[int, ...] = ()

    def of(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split values [P, ...] by segment."""
        return values.split([b - a for a, b in zip(self.borders, self.borders[1:], strict=False)])


def hidden_first(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with its hidden states first, which may have come by name."""
    if args:
        return tuple(args), dict(kwargs)
    _, name, *_ = inspect.signature(type(block).forward).parameters
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


# What a mask adds to hide a key is far above, and a cosine or a sine far below.
_LARGE = 1e3

_MASK = "mask"
_NONE = ""


def axes_of(hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Find the axis of each further argument of a block that runs over its tokens.

    1. Whole numbers that rise from 0 to the number of tokens are cumulative lengths.
    2. A tensor whose last two axes are both as long as the tokens is a mask of queries and keys.
       But with three axes at most and small numbers, it is a table (of angles) that happens to be
       as wide, and its tokens come first.
    3. Any other tensor may have one axis as long as the tokens, after that of the rows; or in front
       of all others, if it is the same for all rows.

    Args:
        hidden: Hidden states [R, P, d] or [P, d].
        args: Arguments after the hidden states.
        kwargs: Keyword arguments.

    Returns:
        An axis, `Segments`, ``"mask"`` or ``""`` for every leaf of (args, kwargs).

    Raises:
        NoGroups: If it is not clear which axis runs over the tokens.
    """
    leaves, structure = pytree.tree_flatten((list(args), dict(kwargs)))
    return pytree.tree_unflatten([_axis(leaf, hidden) for leaf in leaves], structure)


def _axis(value: Any, hidden: Tensor) -> int | str | Segments:
    if value is None or isinstance(value, (int, float, str, torch.dtype)):
        return _NONE
    if not isinstance(value, Tensor):
        raise NoGroups(f"its blocks are given a {type(value).__name__}")
    length, rows = hidden.shape[-2], hidden.shape[0] if hidden.ndim == 3 else 1
    if value.ndim == 1 and not value.is_floating_point() and not value.is_meta and rows == 1:
        borders = value.tolist()
        if borders and (borders[0], borders[-1]) == (0, length) and borders == sorted(borders):
            # Case 1.
            return Segments(tuple(borders))
    axes = [axis - value.ndim for axis, size in enumerate(value.shape) if size == length]
    if axes == [-2, -1] and _is_table(value) and rows == 1:
        # Case 2: a table.
        return -2
    if axes == [-2, -1] and value.ndim > 2:
        # Case 2: a mask.
        return _MASK
    shared = len(axes) == 1 and _is_shared(value, axes[0]) and rows != length
    if len(axes) == 1 and (rows == 1 or shared or _has_rows(value, axes[0], rows)):
        # Case 3.
        return axes[0]
    if value.numel() == 1:
        return _NONE
    raise NoGroups(
        f"its blocks are given a tensor {list(value.shape)} beside hidden states "
        f"{list(hidden.shape)}, of which it is not known how it goes with single patches"
    )


def _is_table(value: Tensor) -> bool:
    """Return whether a square value of floats is no mask, which adds nothing or large numbers."""
    if value.ndim > 3 or not value.is_floating_point() or value.is_meta:
        return False
    return 0 < float(value.abs().max()) < _LARGE


def _has_rows(value: Tensor, axis: int, rows: int) -> bool:
    """Return whether an axis of rows comes before that of the tokens; it may be 1 long."""
    return value.ndim > -axis and value.shape[0] in (1, rows)


def _is_shared(value: Tensor, axis: int) -> bool:
    """Return whether no axis of rows comes before that of the tokens."""
    return value.ndim == -axis


def have_no_rows(axes: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether some argument is the same for all rows, so that these need the same tokens.

    Args:
        axes: What `axes_of` found.
        args: Arguments after the hidden states.
        kwargs: Keyword arguments.
    """
    leaves = pytree.tree_leaves((list(args), dict(kwargs)))
    both = zip(pytree.tree_leaves(axes), leaves, strict=True)
    return any(isinstance(axis, int) and _is_shared(value, axis) for axis, value in both)


def arguments_at(
    index: Tensor,
    axes: Any,
    hidden: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rows: Tensor | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return all arguments of a block for some of its tokens.

    Args:
        index: [R, M] places of the tokens in each row, ascending where there are segments, and the
            same in all rows where `have_no_rows`.
        axes: What `axes_of` found.
        hidden: Hidden states [R, P, d] or [P, d].
        args: Arguments after the hidden states.
        kwargs: Keyword arguments.
        rows: [R] numbers of the rows in question, if they are some of the hidden states' rows.
    """
    if rows is not None:
        hidden = hidden[rows]
    leaves, structure = pytree.tree_flatten((list(args), dict(kwargs)))
    of_leaves = [
        _at(index, axis, leaf, rows)
        for axis, leaf in zip(pytree.tree_leaves(axes), leaves, strict=True)
    ]
    others, named = pytree.tree_unflatten(of_leaves, structure)
    return (_at(index, -2, hidden, None), *others), named


def _at(index: Tensor, axis: int | str | Segments, value: Any, rows: Tensor | None) -> Any:
    if isinstance(axis, Segments):
        # How many of the tokens come before each border. Segments without any are left out.
        if axis.left:
            return value.new_tensor([*dict.fromkeys(axis.left)])
        borders = torch.searchsorted(index[0].sort().values, value.to(index))
        return borders.unique_consecutive().to(value.dtype)
    if axis == _NONE:
        return value
    if axis == _MASK:
        return _at(index, -1, _at(index, -2, value, rows), None)
    index = index.to(value.device)
    if _is_shared(value, int(axis)):
        return value.index_select(0, index[0])
    if rows is not None and len(value) > 1:
        value = value[rows.to(value.device)]
    if len(index) == 1:
        # Case: one row, so values need no axis of rows.
        return value.index_select(int(axis), index[0])
    # Case: several rows. Values that are the same in all of them are expanded.
    count, length = index.shape
    value = value.expand(count, *value.shape[1:])
    at = index.reshape(count, *(length if k == axis else 1 for k in range(1 - value.ndim, 0)))
    shape = [length if k == axis else value.shape[k] for k in range(-value.ndim, 0)]
    return value.gather(int(axis), at.expand(shape))


def in_one_row(
    axes: Any, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block for one row [1, R P, d] of the tokens of all rows.

    Args:
        axes: What `axes_of` found.
        hidden: Hidden states [R, P, d], with R > 1.
        args: Arguments after the hidden states.
        kwargs: Keyword arguments.

    Raises:
        NoGroups: If there is a mask of queries and keys for each row.
    """
    rows = len(hidden)

    def joined(axis: int | str | Segments, value: Any) -> Any:
        if axis == _MASK:
            raise NoGroups("its blocks are given a mask for each row of patches")
        if not isinstance(axis, int):
            return value
        if _is_shared(value, axis):
            return value.expand(rows, *value.shape).flatten(0, 1)
        # The axis of rows moves in front of that of the tokens.
        whole = value.expand(rows, *value.shape[1:]).movedim(0, axis - 1)
        return whole.flatten(axis - 1, axis)[None]

    leaves, structure = pytree.tree_flatten((list(args), dict(kwargs)))
    both = zip(pytree.tree_leaves(axes), leaves, strict=True)
    others, named = pytree.tree_unflatten([joined(*pair) for pair in both], structure)
    return hidden.flatten(0, 1)[None], tuple(others), named
