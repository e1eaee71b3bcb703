"""Move the embeddings of the text before the features of images, which may be ranked by them."""

from __future__ import annotations

from torch import fx

from deos_fx.passes.analyse.sites import Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import made_of

__all__ = ["read_text_first"]


def read_text_first(graph_module: fx.GraphModule, sites: Sites) -> fx.GraphModule:
    """Put the prompts' embeddings, and what they are made of, before the features of images.

    Most models read the text first; some encode the images first (BLIP-2).

    Args:
        graph_module: A captured prefill graph. Changed in place.
        sites: Its sites.

    Returns:
        The same graph module.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    features, embeddings = nodes[sites.features], nodes[sites.embeddings]
    needed = made_of(embeddings)
    for node in list(graph_module.graph.nodes):
        # In their order, so that each is moved after what it is made of.
        if node in needed and node > features:
            features.prepend(node)
    return finish(graph_module)
