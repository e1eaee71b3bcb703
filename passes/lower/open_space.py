"""Open a new token space: let everything after a cut see only the kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from deos_fx.passes.analyse.annotate_token_spaces import MASK
from deos_fx.passes.capture.guards import check_guard
from deos_fx.tokens.index import take, take_each, take_in_each, take_mask

__all__ = ["has_prompt_axis", "open_space"]

# Attributes of a tensor that say nothing about its tokens' contents.
_METADATA = ("shape", "dtype", "device")


def open_space(
    graph: fx.Graph,
    cut: fx.Node,
    reduced: fx.Node,
    index: fx.Node,
    replaced: dict[fx.Node, fx.Node],
    space: str,
) -> None:
    """Continue the graph after `cut` in the space of the kept tokens.

    1. Every user of `cut` that comes after `reduced` uses `reduced` instead. Nodes that read only
       its shape stay in the old space: positions counted from it are original positions. A node
       after the cut that takes a size gets the new space's size.
    2. Every node after the cut that also takes a value of the old space takes it re-indexed, along
       the axes that `annotate_token_spaces` found. Values with a meaning of their own in the new
       space (position ids) are given in `replaced`.
    3. Masks that depend on more than the order of tokens (windows, blocks of image tokens) are made
       in the old space and re-indexed: distances are those of the original prompt.

    Args:
        graph: An annotated graph. Changed in place.
        cut: The hidden states [B, N, d] of the old space.
        reduced: The hidden states [B, M, d] of the new space, already in the graph.
        index: [B, M] positions of the kept tokens in the old space.
        replaced: Old value -> its counterpart in the new space. Re-indexed values are added.
        space: Name of the new space; names of re-indexed values end in it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    behind = _behind(cut, order[reduced])
    _drop_guards(behind)
    sizes = _sizes_of(cut)
    for node in graph.nodes:
        if node not in behind and any(value in behind for value in node.all_input_nodes):
            # Rule 3: a mask made in the old space. Of the hidden states it reads only the length.
            node.kwargs = fx.node.map_arg(
                node.kwargs, lambda value: cut if value in behind else value
            )
    for node in sorted(behind, key=order.__getitem__):
        for value in node.all_input_nodes:
            if value is cut:
                # Rule 1: the hidden states themselves.
                node.replace_input_with(cut, reduced)
            elif value in sizes:
                # Rule 1: a size of the old space.
                with graph.inserting_before(node):
                    node.replace_input_with(value, _copied(graph, value, cut, reduced))
            elif value not in behind and value is not reduced and has_prompt_axis(value):
                # Rule 2: a value of the old space.
                if value not in replaced:
                    # The value may be made after the cut, though not from it.
                    last = max(value, index, key=order.__getitem__)
                    with graph.inserting_before(last.next):
                        replaced[value] = _reindexed(graph, value, index, space)
                    order = {node: i for i, node in enumerate(graph.nodes)}
                node.replace_input_with(value, replaced[value])
        if node.meta.get("prompt_axes") == MASK and "position_ids" in node.kwargs:
            # transformers reads gaps in position ids as borders of packed sequences.
            node.kwargs = {**node.kwargs, "position_ids": None}


def _drop_guards(behind: set[fx.Node]) -> None:
    """Drop guards on lengths after the cut: they compared lengths of the old space."""
    stack = [user for node in behind for user in node.users if _is_metadata(user)]
    while stack:
        node = stack.pop()
        stack.extend(node.users)
        if node.target is check_guard and node not in stack:
            node.graph.erase_node(node)


def _sizes_of(cut: fx.Node) -> set[fx.Node]:
    """Find the metadata of a value, its parts, and the numbers computed from these alone."""
    found: set[fx.Node] = set()
    stack = [user for user in cut.users if _is_metadata(user)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            plain = node.op == "call_function" and node.target is not check_guard
            plain = plain or _is_metadata(node)
            users = [user for user in node.users if found.issuperset(user.all_input_nodes)]
            # Only values without axes: numbers, and tuples of numbers.
            numbers = (user for user in users if not any(pytree.tree_leaves(user.meta["shape"])))
            stack.extend(numbers if plain else ())
    return found


def _copied(graph: fx.Graph, size: fx.Node, cut: fx.Node, reduced: fx.Node) -> fx.Node:
    """Copy the computation of a size of `cut`, so that it reads `reduced` instead."""
    if size is cut:
        return reduced
    made = [_copied(graph, source, cut, reduced) for source in size.all_input_nodes]
    again = dict(zip(size.all_input_nodes, made, strict=True))
    copy = graph.node_copy(size, again.__getitem__)
    copy.meta = dict(size.meta)
    return copy


def _behind(cut: fx.Node, position: int) -> set[fx.Node]:
    """Find the nodes after `position` that depend on the cut, not counting its metadata."""
    order = {node: i for i, node in enumerate(cut.graph.nodes)}
    found: set[fx.Node] = set()
    stack = [user for user in cut.users if order[user] > position and not _is_metadata(user)]
    while stack:
        node = stack.pop()
        if node not in found and node.op != "output" and not _stays(node):
            found.add(node)
            stack.extend(user for user in node.users if not _is_metadata(user))
    return found


def _stays(node: fx.Node) -> bool:
    """Return whether a node makes masks that depend on more than order and padding."""
    return node.op == "call_module" and not node.meta.get("plain_mask", True)


def _is_metadata(node: fx.Node) -> bool:
    """Return whether a node reads the shape, dtype or device of a tensor."""
    if node.op == "call_method":
        return node.target == "size"
    return node.target is getattr and node.args[1] in _METADATA


def has_prompt_axis(node: fx.Node) -> bool:
    """Return whether a value, or a part of it, has a row for every token of the prompt.

    Args:
        node: An annotated node.
    """
    axes = node.meta.get("prompt_axes")
    if isinstance(axes, (tuple, list)):
        return any(axis is not None for axis in axes)
    return axes is not None


def _reindexed(graph: fx.Graph, value: fx.Node, index: fx.Node, space: str) -> fx.Node:
    """Emit a value in the new space, annotated like the old one and named after both."""
    axes = value.meta["prompt_axes"]
    if axes == 0:
        return _flattened_again(graph, value, index, space)
    root = value.meta.get("root", value.name)
    target: Callable[..., Any]
    args: tuple[Any, ...] = (value, index)
    if axes == MASK:
        target = take_mask
    elif axes == 2:
        target = take_in_each
    elif isinstance(axes, int):
        target = take
        args = args if axes == 1 else (*args, axes)
    else:
        # Case: a tuple of values, each with an axis of its own.
        target = take_each
        args = (*args, tuple(axes))
    node = graph.create_node("call_function", target, args, {}, f"{root}_{space}")
    node.meta.update(prompt_axes=axes, root=root, padding=value.meta.get("padding", False))
    return node


def _flattened_again(graph: fx.Graph, value: fx.Node, index: fx.Node, space: str) -> fx.Node:
    """Make a value again whose leading axis is batch and prompt together, such as a loss's labels.

    Its inputs, in which the two axes are still apart, are re-indexed.
    """
    apart = {
        source: _reindexed(graph, source, index, space)
        for source in value.all_input_nodes
        if has_prompt_axis(source)
    }
    assert apart, f"{value.name} runs over the prompt but belongs to no row of the batch"
    node = graph.node_copy(value, lambda source: apart.get(source, source))
    node.meta = dict(value.meta)
    return node
