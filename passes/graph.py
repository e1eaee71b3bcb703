"""Walk a graph: what a node is made of, what depends on it, and which blocks come after it.

Nodes of one graph compare by their places: ``a < b`` if `a` comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from deos_fx.passes.notes import note_of

__all__ = [
    "attends",
    "block_after",
    "blocks_after",
    "blocks_of",
    "has_streams",
    "made_of",
    "nodes_after",
    "reached",
    "users_after",
]


def blocks_of(graph: fx.Graph, stage: str) -> dict[int, fx.Node]:
    """Find the nodes that call the blocks of a stage (``vision`` or ``decoder``).

    Returns:
        Index of the block -> its node, in the order of the graph. Blocks whose output nothing uses
        have no node.
    """
    noted = ((note_of(node).block, node) for node in graph.nodes)
    return {block.index: node for block, node in noted if block and block.stage == stage}


def attends(node: fx.Node) -> bool:
    """Return whether the block that a node calls attends.

    Decoder layers that attend are given a mask of queries and keys, unless they choose keys by an
    index and make that mask themselves. Those that convolve or keep a state get a mask of padding,
    perhaps beside the other, and those that look at each token alone get none.
    """
    block = note_of(node).block
    if note_of(node).indexes or note_of(node).stateful:
        return note_of(node).indexes
    if block is None or block.stage == "vision" or "attention_mask" not in node.kwargs:
        # Case: a vision block, or a layer that is given its mask in another way.
        return True
    mask = node.kwargs["attention_mask"]
    return isinstance(mask, fx.Node) and not note_of(mask).padding


def has_streams(node: fx.Node) -> bool:
    """Return whether hidden states are several streams [B, N, s, d] of each token."""
    return len(note_of(node).shape) > 3


def nodes_after(node: fx.Node, until: fx.Node | None = None) -> Iterator[fx.Node]:
    """Go from node to node of a graph, and leave its output out.

    Nodes may be inserted before the current one, and erased after it, on the way.

    Args:
        node: The node before the first one.
        until: The last one; None for all.
    """
    while node is not until and (node := node.next).op not in ("output", "root"):
        yield node


def block_after(node: fx.Node, stage: str) -> fx.Node | None:
    """Return the node that calls the next block of a stage after a node; None if there is none."""
    return next((found for found in nodes_after(node) if _in_stage(found, stage)), None)


def blocks_after(node: fx.Node, stage: str, until: fx.Node | None = None) -> list[fx.Node]:
    """Return the nodes that call blocks of a stage after a node, in order.

    Args:
        node: The node.
        stage: ``vision`` or ``decoder``.
        until: The last node that is looked at; None for all.
    """
    return [found for found in nodes_after(node, until) if _in_stage(found, stage)]


def _in_stage(node: fx.Node, stage: str) -> bool:
    """Return whether a node calls a block of a stage."""
    block = note_of(node).block
    return block is not None and block.stage == stage


def users_after(node: fx.Node, anchor: fx.Node) -> list[fx.Node]:
    """Return the users of a node at or after a place of insertion.

    Earlier users, such as a reduction's peek into the next block, must go on reading the unreduced
    value.
    """
    # Nodes compare by their places in the graph.
    return [user for user in node.users if user >= anchor]


def made_of(node: fx.Node) -> set[fx.Node]:
    """Return the node and all its ancestors."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def reached(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all their descendants."""
    found: set[fx.Node] = set()
    stack = list(sources)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found
