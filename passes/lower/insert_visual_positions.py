"""Insert the positions of the visual tokens, from the placeholders in the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from deos_fx import tokens
from deos_fx.models.families import is_encoder
from deos_fx.passes.analyse.find_sites import Sites
from deos_fx.tokens.layout import PromptLayout

__all__ = ["insert_visual_positions"]

# The parameter that holds the learned feature at the end of each row of an image.
_NEWLINE = "image_newline"


def insert_visual_positions(
    graph_module: fx.GraphModule,
    sites: Sites,
    layout: PromptLayout,
    call: Callable[..., fx.Node],
) -> fx.Node:
    """Insert a node of the positions [B, V] of all visual tokens that may be reduced.

    Args:
        graph_module: A captured prefill graph. Changed in place.
        sites: Its sites.
        layout: The prompts this graph is for. Where some placeholders are ends of rows, these are
            recognised by their features, which are a parameter of the model.
        call: Emits nodes.

    Returns:
        The node. If there are ends of rows, it stands after the prompt's embeddings with images in
        place.
    """
    graph = graph_module.graph
    (input_ids,) = graph.find_nodes(op="placeholder", target="input_ids")
    given = input_ids, layout.image_token, sum(layout.sizes)
    if not layout.separators:
        with graph.inserting_after(input_ids):
            return call(tokens.visual_positions, *given)
    # Case: some placeholders are ends of rows, which their ids do not tell.
    encoder = next(node for node in graph.nodes if is_encoder(node))
    core: Any = graph_module.get_submodule(str(encoder.target)).core
    graph_module.register_parameter(_NEWLINE, getattr(core, _NEWLINE))
    merged = next(node for node in graph.nodes if node.name == sites.features)
    with graph.inserting_before(merged.next):
        ends = call(tokens.is_separator, merged, graph.get_attr(_NEWLINE))
        return call(tokens.visual_positions, *given, ends)
