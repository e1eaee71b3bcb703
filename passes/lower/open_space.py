"""Open new token spaces: let everything after a cut see only the kept tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from deos_fx.attention.mask import biased_mask
from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.graph import nodes_after
from deos_fx.passes.notes import annotate, note_of
from deos_fx.tokens.index import take, take_each, take_in_each, take_mask

__all__ = ["OpenSpaces", "reindexed"]

# Attributes of a tensor that say nothing about its tokens' contents.
_METADATA = ("shape", "dtype", "device")


@dataclass(frozen=True)
class _Space:
    """A space that has been opened.

    Attributes:
        reduced: The hidden states [B, M, d] that it begins with.
        index: [B, M] positions of its tokens in the space before.
        replaced: Value of the space before -> its counterpart here.
        name: Names of re-indexed values end in it.
    """

    reduced: fx.Node
    index: fx.Node
    replaced: dict[fx.Node, fx.Node]
    name: str


class OpenSpaces:
    """The token spaces of a graph, which are opened from front to back.

    1. Every user of the hidden states at a cut that comes after it reads the reduced ones instead.
       Nodes that read only their shape stay in the old space, since positions that are counted
       from it are original positions. But a node after the cut that takes a size takes that of its
       own space.
    2. A node after a cut that also takes a value of an earlier space takes it re-indexed, along
       the axes that `annotate_token_spaces` found. Values that have a meaning of their own in the
       new space (position ids) are given when it is opened.
    3. Masks that depend on more than the order of tokens and padding (windows, blocks of image
       tokens) are made in the original space and then re-indexed: their distances are those of the
       original prompt.

    The nodes after a cut are rewritten up to where the next cut will look, so that a graph with
    many cuts is walked about once, and not once for every cut.

    Args:
        graph: An annotated graph. Changed in place.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._spaces: list[_Space] = []
        # Number of the space of every value that is not in the original one. Hidden states at a
        # cut belong to the space that ends there, but who reads them after it is in the new one.
        self._space_of: dict[fx.Node, int] = {}
        self._cuts: dict[fx.Node, int] = {}
        # A size -> the hidden states of which it is one.
        self._sizes: dict[fx.Node, fx.Node] = {}
        # Value -> its counterpart in the latest space in which somebody has asked for it.
        self._latest: dict[fx.Node, fx.Node] = {}
        # Re-indexed values, which may lie after the next cut, too, and stay as they are.
        self._made: set[fx.Node] = set()

    def open(
        self,
        cut: fx.Node,
        reduced: fx.Node,
        index: fx.Node,
        replaced: Mapping[fx.Node, fx.Node],
        name: str,
        *,
        until: fx.Node | None = None,
        enter: Callable[[fx.Node], None] | None = None,
    ) -> None:
        """Continue the graph after `cut` in the space of the kept tokens.

        Args:
            cut: The hidden states [B, N, d] of the space before.
            reduced: The hidden states [B, M, d] of the new space, already in the graph.
            index: [B, M] positions of the kept tokens in the space before.
            replaced: Value of the space before -> its counterpart in the new space, already in the
                graph.
            name: Name of the new space.
            until: The last node that has to be rewritten before another space is opened; None if
                no other will be.
            enter: Called with every decoder layer in the new space that has been rewritten.
        """
        self._spaces.append(_Space(reduced, index, {**replaced, cut: reduced}, name))
        here = len(self._spaces)
        self._cuts[cut] = here
        for node in (reduced, *replaced.values()):
            self._space_of[node] = here
        # A later layer may read these hidden states again, beyond the next cut.
        annotate(reduced, axes=note_of(cut).axes, root=note_of(cut).root or cut.name)
        self._sizes |= dict.fromkeys(_sizes_of(cut), cut)
        for node in nodes_after(max([reduced, *replaced.values()]), until):
            self._rewrite(node)
            block = note_of(node).block
            if enter is not None and block is not None and block.stage == "decoder":
                enter(node)

    def here(self, value: fx.Node) -> fx.Node:
        """Return the counterpart of a value in the latest space."""
        return self._in_space(value, len(self._spaces))

    def _rewrite(self, node: fx.Node) -> None:
        """Let a node read the values of its own space."""
        if _stays(node):
            # Case 3: a mask that is made in the original space. Of the hidden states it reads only
            # the length, so it may read those before the first cut.
            node.kwargs = fx.node.map_arg(node.kwargs, self._uncut)
            return
        space = self._space(node)
        if not space or node in self._made:
            # Case: it does not depend on a cut, or is in the right space.
            return
        self._space_of[node] = space
        _drop_guards(node)
        for value in node.all_input_nodes:
            if value in self._sizes:
                # Case 1: a size of an earlier space.
                node.replace_input_with(value, self._size(value, space, node))
            elif value in self._cuts or note_of(value).has_prompt_axis:
                # Case 1: the hidden states at a cut; case 2: another value.
                node.replace_input_with(value, self._in_space(value, space))
        if note_of(node).is_mask and "position_ids" in node.kwargs:
            # transformers takes gaps in position ids for borders of packed sequences.
            node.kwargs = {**node.kwargs, "position_ids": None}

    def _space(self, node: fx.Node) -> int:
        """Return the number of the space of a node: the latest one among the values that it reads.

        What reads metadata alone is in the original space.
        """
        if _is_metadata(node):
            return 0
        read = node.all_input_nodes
        return max((self._cuts.get(value) or self._number(value) for value in read), default=0)

    def _number(self, value: fx.Node) -> int:
        """Return the number of the space that a value itself is in."""
        if value not in self._space_of and value.target is operator.getitem:
            # Case: perhaps the hidden states of a block that has begun to report observations.
            return self._number(value.all_input_nodes[0])
        return self._space_of.get(value, 0)

    def _uncut(self, value: fx.Node) -> fx.Node:
        """Return the hidden states before the first cut in place of later ones."""
        return next(iter(self._cuts)) if self._number(value) else value

    def _in_space(self, value: fx.Node, space: int) -> fx.Node:
        """Return the counterpart of a value in its own space or a later one."""
        if value.target is biased_mask and isinstance(value.args[0], fx.Node):
            # A bias is that of one space: later ones have their own.
            value = value.args[0]
        here = self._latest.get(value, value)
        if self._number(here) > space:
            here = value
        for k in range(self._number(here) + 1, space + 1):
            opened = self._spaces[k - 1]
            if here not in opened.replaced:
                # The value may be made after the cut, though not from it.
                with self.graph.inserting_before(max(here, opened.index).next):
                    again = reindexed(self.graph, here, opened.index, opened.name)
                opened.replaced[here] = again
                self._space_of[again] = k
                self._made.add(again)
            here = opened.replaced[here]
        self._latest[value] = here
        return here

    def _size(self, size: fx.Node, space: int, node: fx.Node) -> fx.Node:
        """Return a size for a node: that of the hidden states that its own space begins with."""
        old, new = self._sizes[size], self._spaces[space - 1].reduced
        if old is new:
            return size
        with self.graph.inserting_before(node):
            again = _copied(self.graph, size, old, new)
        self._sizes[again] = new
        return again


def _drop_guards(node: fx.Node) -> None:
    """Drop guards on sizes of a node after a cut: they compare with lengths of the old space."""
    stack = [user for user in node.users if _is_metadata(user)]
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
