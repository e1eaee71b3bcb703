"""Find out whether a vision block can run on some of its tokens alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deos_fx.errors import NoGroups
from deos_fx.models.arguments import Segments, arguments_at, axes_of

__all__ = ["kinds_of", "why_all_in_place"]

# The largest difference between what a block adds to its tokens and to the same tokens in another
# order, relative to what it adds: by rounding, in half precision and in others.
_SAME_IN_HALF, _SAME = 0.05, 0.002
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kinds_of(blocks: Mapping[int, nn.Module], given: Mapping[int, Any]) -> list[list[int]]:
    """Return the numbers of blocks, ascending, by their classes and kinds of arguments.

    Args:
        blocks: Blocks by number, in order.
        given: What each block is given beside hidden states. Blocks with windows and without are
            given other tensors.
    """
    found: dict[Any, list[int]] = {}
    for i, block in blocks.items():
        parts = tuple(type(part) for part in block.modules())
        arguments = tuple(id(leaf) for leaf in pytree.tree_leaves(given[i]))
        found.setdefault((parts, arguments), []).append(i)
    return list(found.values())


def why_all_in_place(
    block: nn.Module, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: bool
) -> str:
    """Say why a block needs all of its tokens at their places; empty if it can do with some.

    1. It has a convolution, which reads the tokens beside each.
    2. It is not known how its arguments go with single tokens.
    3. It does something else with the same tokens in another order. Not tried on shapes.

    Args:
        block: The block.
        hidden: Hidden states that it may get, [R, P, d] or [P, d].
        args: Its other arguments.
        kwargs: Its keyword arguments.
        shapes: Whether weights have no values.
    """
    name = type(block).__name__
    convolutions = (part for part in block.modules() if isinstance(part, _CONVOLUTIONS))
    if any(max(convolution.kernel_size) > 1 for convolution in convolutions):
        return f"{name} convolves patches with those beside them, which would be missing"
    try:
        axes = axes_of(hidden, args, kwargs)
    except NoGroups as reason:
        return str(reason)
    if shapes or _is_alike_in_another_order(block, axes, hidden, args, kwargs):
        return ""
    return f"{name} does something else with its tokens in another order"


def _is_alike_in_another_order(
    block: nn.Module, axes: Any, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Return whether a block gives the same tokens in another order if it gets them in that order.

    Args:
        block: The block.
        axes: What `axes_of` found for its arguments, which come in that order, too.
        hidden: Hidden states.
        args: Its other arguments.
        kwargs: Its keyword arguments.
    """
    length = hidden.shape[-2]
    # Backwards, inside each segment if the row is divided into segments.
    places = torch.arange(length, device=hidden.device)
    order = places.flip(0)
    for segments in (axis for axis in pytree.tree_leaves(axes) if isinstance(axis, Segments)):
        order = torch.cat([part.flip(0) for part in segments.of(places)])
    index = order.expand(hidden.shape[0] if hidden.ndim == 3 else 1, -1)
    again, more = arguments_at(index, axes, hidden, args, kwargs)
    with torch.no_grad():
        plain, ordered = (
            pytree.tree_leaves(block.forward(*given, **further))[0]
            for given, further in (((hidden, *args), kwargs), (again, more))
        )
    added = (plain - hidden).index_select(-2, order).float().norm(dim=-1)
    apart = (plain.index_select(-2, order) - ordered).float().norm(dim=-1)
    # The mean over tokens: a few of them may be far larger than all others.
    most = _SAME_IN_HALF if hidden.dtype in (torch.float16, torch.bfloat16) else _SAME
    relative = (apart / added.clamp(min=torch.finfo(torch.float32).tiny)).mean()
    # A NaN is no agreement.
    return bool(relative <= most)
