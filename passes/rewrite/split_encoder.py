"""Split an opaque image encoder off a prefill graph; its features become inputs of the graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from deos_fx.models.families import WRITER
from deos_fx.passes.capture.leaves import check_guard
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import made_of
from deos_fx.passes.lower.reduced_encoder import explained, left_in_tower

__all__ = ["features_of", "split_encoder"]


def features_of(output: Any) -> list[Tensor]:
    """Return the tensors of an encoder's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def split_encoder(graph_module: fx.GraphModule, images: Mapping[str, Tensor]) -> fx.GraphModule:
    """Cut a prefill graph in two after its node ``image_encoder``.

    Guards on the images alone are dropped: the encoder is exported for the sizes that the graph was
    captured with.

    Args:
        graph_module: A captured or lowered graph whose image encoder is one node. Changed in
            place: it gains the inputs ``image_features_0``, ``image_features_1``, ...
        images: The inputs that belong to the images, with the values of the capture.

    Returns:
        The encoder: a graph from the images to a nested list whose leaves are the new inputs, in
        order.

    Raises:
        ValueError: If the encoder gives something else than features, or reads the prompt as well.
    """
    graph = graph_module.graph
    if graph.find_nodes(op="call_module", target=WRITER):
        raise ValueError(
            "The module that encodes images also writes them into the prompt, so it cannot be a "
            "graph of images alone. Run the reduced model in PyTorch, without torch.compile."
        )
    # Guards on the images alone.
    for guard in graph.find_nodes(op="call_function", target=check_guard):
        if {node.name for node in made_of(guard) if node.op == "placeholder"} <= images.keys():
            graph.erase_node(guard)
    (encoder,) = graph.find_nodes(op="call_module", target="image_encoder")
    # What explains reductions inside the encoder is for the whole graph alone.
    for value in graph.find_nodes(op="call_function", target=explained):
        graph.erase_node(value)
    # Fields of the encoder's output that the prefill reads. The encoder's graph will read them,
    # since inputs of an exported graph are tensors.
    parts = [user for user in encoder.users if user.target in (getattr, left_in_tower)]
    needed = made_of(encoder) | {*parts}
    front = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        # All images become inputs, also those that the encoder does not read: it is called with
        # all.
        if node.name in images or node in needed:
            copies[node] = front.node_copy(node, copies.__getitem__)
    front.output([copies[part] for part in parts])
    encode = finish(fx.GraphModule(graph_module, front, "ImageEncoder"))
    # Run it once to see how many tensors each field has.
    with torch.no_grad():
        values = encode(**images)
    count = itertools.count()

    def given(value: Any) -> Any:
        """Insert an input for a tensor, and the like of a structure of tensors and numbers."""
        if isinstance(value, (list, tuple)):
            # Case: a list, such as the features of each depth of DeepStack.
            return graph.call_function(tuple, ([given(item) for item in value],))
        if not isinstance(value, Tensor):
            # Case: a number, such as the layer that features are for. It does not follow from
            # pixels.
            return value
        # Inputs come before all other nodes.
        with graph.inserting_before(graph.find_nodes(op="placeholder")[0]):
            return graph.placeholder(f"image_features_{next(count)}")

    for part, value in zip(parts, values, strict=True):
        with graph.inserting_before(part):
            new = given(value)
        if not isinstance(new, fx.Node):
            raise ValueError(
                f"The image encoder gives {new!r} in place of features, which cannot be an input "
                "of an exported graph. Run the reduced model in PyTorch."
            )
        part.replace_all_uses_with(new)
    return encode
