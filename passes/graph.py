"""Walking a graph: ancestors of a node, and users and blocks after it."""

from __future__ import annotations

import re

from torch import fx

__all__ = ["blocks_behind", "made_of", "users_behind"]


def blocks_behind(node: fx.Node, stage: str) -> list[fx.Node]:
    """Return the blocks of a stage (``vision`` or ``decoder``) after a node, in order."""
    behind = False
    found = []
    for other in node.graph.nodes:
        if behind and re.fullmatch(rf"{stage}_\d+", other.name):
            found.append(other)
        behind = behind or other is node
    return found


def users_behind(node: fx.Node, anchor: fx.Node) -> list[fx.Node]:
    """Return the users of a node at or after a place of insertion.

    Earlier users, such as a reduction's peek into the next block, must go on reading the unreduced
    value.
    """
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    return [user for user in node.users if order[user] >= order[anchor]]


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
