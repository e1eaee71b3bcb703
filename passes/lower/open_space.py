"""Open a new token space: let everything after a cut see only the kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.notes import annotate, note_of
from deos_fx.tokens.index import take, take_each, take_in_each, take_mask

__all__ = ["open_space", "reindexed"]

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

    1. Every user of `cut` that comes after `reduced` reads `reduced` instead. Nodes that read only
       the shape of `cut` stay in the old space, since positions that are counted from it are
       original positions. But a node after the cut that takes a size takes that of the new space.
    2. A node after the cut that also takes a value of the old space takes it re-indexed, along the
       axes that `annotate_token_spaces` found. Values that have a meaning of their own in the new
       space (position ids) are given in `replaced`.
    3. Masks that depend on more than the order of tokens and padding (windows, blocks of image
       tokens) are made in the old space and then re-indexed: their distances are those of the
       original prompt.

    Args:
        graph: An annotated graph. Changed in place.
        cut: The hidden states [B, N, d] of the old space.
        reduced: The hidden states [B, M, d] of the new space, already in the graph.
        index: [B, M] positions of the kept tokens in the old space.
        replaced: Old value -> its counterpart in the new space. Re-indexed values are added.
        space: Name of the new space; names of re-indexed values end in it.
    """
    after = _after(cut, reduced)
    _drop_guards(after)
    sizes = _sizes_of(cut)
    for node in graph.nodes:
        if node not in after and any(value in after for value in node.all_input_nodes):
            # Case 3: a mask that is made in the old space. Of the hidden states it reads only the
            # length, so it may read those before the cut.
            node.kwargs = fx.node.map_arg(
                node.kwargs, lambda value: cut if value in after else value
            )
    # In the order of the graph: a set has none, and names must not differ from run to run.
    for node in sorted(after):
        for value in node.all_input_nodes:
            if value is cut:
                # Case 1: the hidden states themselves.
                node.replace_input_with(cut, reduced)
            elif value in sizes:
                # Case 1: a size of the old space.
                with graph.inserting_before(node):
                    node.replace_input_with(value, _copied(graph, value, cut, reduced))
            elif value not in after and value is not reduced and note_of(value).has_prompt_axis:
                # Case 2: a value of the old space.
                if value not in replaced:
                    # The value may be made after the cut, though not from it.
                    with graph.inserting_before(max(value, index).next):
                        replaced[value] = reindexed(graph, value, index, space)
                node.replace_input_with(value, replaced[value])
        if note_of(node).is_mask and "position_ids" in node.kwargs:
            # transformers takes gaps in position ids for borders of packed sequences.
            node.kwargs = {**node.kwargs, "position_ids": None}


def _drop_guards(after: set[fx.Node]) -> None:
    """Drop guards on sizes after the cut: they compare with lengths of the old space."""
    stack = [user for node in after for user in node.users if _is_metadata(user)]
    while stack:
        node = stack.pop()
        stack.extend(node.users)
        # A guard may be found by several paths, and is erased once.
        if node.target is check_guard and node not in stack:
            node.graph.erase_node(node)


def _sizes_of(cut: fx.Node) -> set[fx.Node]:
    """Find the metadata of a value, parts of it, and numbers that are computed from these alone."""
    found: set[fx.Node] = set()
    stack = [user for user in cut.users if _is_metadata(user)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            plain = node.op == "call_function" and node.target is not check_guard
            plain = plain or _is_metadata(node)
            users = [user for user in node.users if found.issuperset(user.all_input_nodes)]
            # Only values without axes: numbers, and tuples of numbers. A tensor made from a size,
            # such as positions, stays in the old space.
            numbers = (user for user in users if not any(pytree.tree_leaves(note_of(user).shape)))
            stack.extend(numbers if plain else ())
    return found


def _copied(graph: fx.Graph, size: fx.Node, cut: fx.Node, reduced: fx.Node) -> fx.Node:
    """Copy the computation of a size of `cut`, so that it reads `reduced` instead."""
    if size is cut:
        return reduced
    made = [_copied(graph, source, cut, reduced) for source in size.all_input_nodes]
    again = dict(zip(size.all_input_nodes, made, strict=True))
    return graph.node_copy(size, again.__getitem__)


def _after(cut: fx.Node, reduced: fx.Node) -> set[fx.Node]:
    """Find the nodes after `reduced` that depend on the cut, not counting its metadata."""
    found: set[fx.Node] = set()
    stack = [user for user in cut.users if user > reduced and not _is_metadata(user)]
    while stack:
        node = stack.pop()
        if node not in found and node.op != "output" and not _stays(node):
            found.add(node)
            stack.extend(user for user in node.users if not _is_metadata(user))
    return found


def _stays(node: fx.Node) -> bool:
    """Return whether a node makes masks that depend on more than order and padding (case 3)."""
    return node.op == "call_module" and note_of(node).plain is False


def _is_metadata(node: fx.Node) -> bool:
    """Return whether a node reads the shape, dtype or device of a tensor."""
    if node.op == "call_method":
        return node.target == "size"
    return node.target is getattr and node.args[1] in _METADATA


def reindexed(graph: fx.Graph, value: fx.Node, index: fx.Node, space: str) -> fx.Node:
    """Emit a value in the new space, annotated like the old one and named after both.

    Args:
        graph: An annotated graph. Changed in place.
        value: A value with a prompt axis.
        index: [B, M] positions of the kept tokens in the old space.
        space: Name of the new space.

    Returns:
        The value, with the kept tokens along its prompt axis.
    """
    note = note_of(value)
    if note.axes == 0:
        # Case: batch and prompt are one axis.
        return _flattened_again(graph, value, index, space)
    root = note.root or value.name
    target: Callable[..., Any]
    args: tuple[Any, ...] = (value, index)
    if note.is_mask:
        target = take_mask
    elif note.axes == 2:
        target = take_in_each
    elif isinstance(note.axes, int):
        target = take
        # The prompt is the second axis of most values, and the default.
        args = args if note.axes == 1 else (*args, note.axes)
    else:
        # Case: a tuple of values, each with an axis of its own.
        target = take_each
        args = (*args, tuple(note.axes))
    node = graph.create_node("call_function", target, args, {}, f"{root}_{space}")
    annotate(node, axes=note.axes, root=root, padding=note.padding)
    return node


def _flattened_again(graph: fx.Graph, value: fx.Node, index: fx.Node, space: str) -> fx.Node:
    """Make a value again whose leading axis is batch and prompt together (labels of a loss).

    Its inputs, in which the two axes are still apart, are re-indexed instead.
    """
    apart = {
        source: reindexed(graph, source, index, space)
        for source in value.all_input_nodes
        if note_of(source).has_prompt_axis
    }
    assert apart, f"{value.name} runs over the prompt but belongs to no row of the batch"
    return graph.node_copy(value, lambda source: apart.get(source, source))
