"""Let the decoder layers of a prompt with images also see earlier turns of the conversation."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from deos_fx.attention.continued import ContinuedLayer
from deos_fx.models.blocks import counts_positions
from deos_fx.models.upstream import CACHE
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import attends, blocks_of
from deos_fx.passes.notes import annotate_graph, note_of, note_of_graph

__all__ = ["continue_text", "continues"]


def continue_text(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Wrap every decoder layer as a `ContinuedLayer`.

    The graph is that of a prompt of its own, captured on an empty `TurnCache`; what the layers see
    of earlier turns comes from the cache that it is called with.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.

    Returns:
        The same graph module.

    Raises:
        ValueError: If a layer does not attend with a mask and a cache that it is given by name, or
            counts positions itself.
    """
    note = note_of_graph(graph_module)
    wrapped = dict(note.blocks)
    for index, node in blocks_of(graph_module.graph, "decoder").items():
        layer = graph_module.get_submodule(str(node.target))
        if not attends(node) and CACHE in node.kwargs:
            # Case: a layer with a state, which goes on from that of the turns before, or one that
            # looks at each token alone.
            continue
        named = {"attention_mask", CACHE} <= node.kwargs.keys()
        mask = node.kwargs.get("attention_mask")
        # An index may make a mask of keys from one of padding.
        of_keys = (
            named and attends(node) and not (isinstance(mask, fx.Node) and note_of(mask).padding)
        )
        if not of_keys or counts_positions(layer):
            raise ValueError(
                f"A later turn brings images, and {type(layer).__name__} does not attend by a mask "
                "and a cache alone, so it is not known what it would read of earlier turns. Give "
                "all images in the first turn."
            )
        again = ContinuedLayer(layer, index)
        graph_module.set_submodule(str(node.target), again)
        block = note_of(node).block
        assert block is not None
        wrapped[block] = again
    # A peek into a layer finds it by its block.
    annotate_graph(graph_module, replace(note, blocks=wrapped))
    return finish(graph_module)


def continues(graph_module: fx.GraphModule, layer: fx.Node) -> bool:
    """Return whether a node calls a layer that sees earlier turns."""
    module = graph_module.get_submodule(str(layer.target))
    return any(isinstance(part, ContinuedLayer) for part in module.modules())
