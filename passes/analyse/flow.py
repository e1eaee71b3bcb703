"""Follow values through a graph: where images and prompt meet, and what comes after a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import networkx as nx
from torch import fx

from deos_fx.errors import CaptureError
from deos_fx.models.families import is_encoder
from deos_fx.passes.graph import reached
from deos_fx.passes.notes import note_of
from deos_fx.passes.rewrite.fold_masked_add import visual_rows

__all__ = ["Sweep", "data_flow", "dominators", "encoded", "find_merge", "find_operands"]


def find_merge(graph: fx.Graph, pixels: Sequence[fx.Node]) -> fx.Node:
    """Find the first value made of all images and videos with a row for every prompt token.

    The value must depend on contents: a mask of the placeholders is not it, though it may read the
    shape of the features.

    Args:
        graph: An annotated graph.
        pixels: The inputs with pixels.

    Returns:
        The node that joins features and embeddings.

    Raises:
        CaptureError: If there is none, or the graph lacks text or images.
    """
    if not pixels or not graph.find_nodes(op="placeholder", target="input_ids"):
        raise CaptureError("Sites are found on a graph with both input_ids and pixel_values.")
    # With images and videos, the merge of the second kind has both.
    from_all = set.intersection(*(reached([source]) for source in pixels))
    for node in graph.nodes:
        of_prompt = node.op != "output" and isinstance(note_of(node).axes, int)
        if of_prompt and note_of(node).content and node in from_all:
            # Rows of zeros and features are not the merge yet: the next node adds them to the
            # embeddings.
            return next(iter(node.users)) if node.target is visual_rows else node
    raise CaptureError(
        "The visual features never join the prompt's embeddings: models that read images through "
        "cross-attention are not supported. Use a model with image placeholders in its prompt."
    )


def find_operands(merge: fx.Node, pixels: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Find the two values that meet in the merge.

    Args:
        merge: The node that `find_merge` found.
        pixels: The inputs with pixels.

    Returns:
        The features [I, V, d], or a value made of an opaque encoder's output, and the embeddings
        [B, N, d].

    Raises:
        CaptureError: If what enters the prompt is not the features of all images one after the
            other: tokens were added to those of an image, or taken away.
    """
    from_images, opaque = reached(pixels), encoded(merge.graph)
    # Not the mask of the placeholders [B, N, 1], which also has three axes.
    embeddings = next(
        node
        for node in merge.all_input_nodes
        if node not in from_images and _rank(node) == 3 and note_of(node).shape[2] > 1
    )
    if is_encoder(merge):
        # Case: one module encodes the images and writes them into the prompt.
        return merge, embeddings
    # An operand is recognised by what it is made of, not by its place: models differ.
    features = next(node for node in merge.all_input_nodes if node in from_images)
    if features.target is visual_rows:
        features = features.all_input_nodes[1]
    # Back from flat features [T, d] to those with an axis of images [I, V, d]. An opaque encoder's
    # features may have no such axis.
    flat = features
    while _rank(features) != 3 and features not in opaque:
        features = next(node for node in features.all_input_nodes if node in from_images)
    if features not in opaque and _vectors(features) != _vectors(flat):
        raise CaptureError(
            f"{flat.name} has {_vectors(flat)} vectors for the prompt, and {features.name}, the "
            f"last value with an axis of images, has {_vectors(features)}: which tokens were added "
            "to an image or taken away cannot be followed. Use a model that changes the features "
            "of all images at once."
        )
    return features, embeddings


def _vectors(node: fx.Node) -> int:
    """Return how many vectors a node's value consists of."""
    return math.prod(note_of(node).shape[:-1])


def _rank(node: fx.Node) -> int:
    """Return the number of axes of a node's value; -1 if it is not a tensor."""
    shape = note_of(node).shape
    return len(shape) if all(isinstance(size, int) for size in shape) else -1


def encoded(graph: fx.Graph) -> set[fx.Node]:
    """Return the opaque image and video encoders and everything after them."""
    return reached(node for node in graph.nodes if is_encoder(node))


def data_flow(graph: fx.Graph, merge: fx.Node) -> nx.DiGraph:
    """Build the graph of the values that flow from node to node; reading a shape is no flow.

    Args:
        graph: An annotated graph.
        merge: The node that `find_merge` found.
    """
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    for node in graph.nodes:
        # DeepStack's features have one row per prompt token. They are re-indexed, so they are no
        # path around a site.
        beside = node.target is visual_rows and node not in merge.all_input_nodes
        if note_of(node).content and not beside:
            flow.add_edges_from((source, node) for source in node.all_input_nodes)
    return flow


def dominators(flow: nx.DiGraph, start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the nodes that every path from `start` to `end` passes."""
    # The immediate dominator of a node is the last one that every path to it passes.
    parents = nx.immediate_dominators(flow, start)
    through = {end}
    node = end
    while node is not start:
        node = parents[node]
        through.add(node)
    return through


class Sweep:
    """What comes after some values, which are given from the last one to the first.

    What was found stays, so a step back only adds what lies between two values, and no node is
    visited twice.

    Args:
        following: Returns the nodes after a node.

    Attributes:
        after: Everything after the values so far. The output does not count.
        beside: Values that are read after them but do not come after them -> one of their readers.
    """

    def __init__(self, following: Callable[[fx.Node], Iterable[fx.Node]]) -> None:
        self.following = following
        self.after: set[fx.Node] = set()
        self.beside: dict[fx.Node, fx.Node] = {}
        # The values so far that do not come after another one of them.
        self._first: set[fx.Node] = set()

    def back_to(self, value: fx.Node) -> bool:
        """Go back to an earlier value, and return whether all values so far come after it."""
        stack = [value]
        while stack:
            for node in self.following(stack.pop()):
                self._first.discard(node)
                if node not in self.after and node.op != "output":
                    self.after.add(node)
                    stack.append(node)
                    self.beside.update(dict.fromkeys(node.all_input_nodes, node))
        # What was beside the later values may come after this one, or be it.
        self.beside = {
            source: node
            for source, node in self.beside.items()
            if source not in self.after and source is not value
        }
        whole = not self._first
        self._first.add(value)
        return whole
