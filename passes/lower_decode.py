"""Lower the decode graph: each layer attends to its own, differently long, cache.

Nothing is reduced while decoding. A new token only needs, for the layers of each token space, a
mask as wide as those layers' caches and, where positions were compacted, its position there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx

from deos_fx.passes.annotate_token_spaces import MASK, position_tables
from deos_fx.passes.finish import finish
from deos_fx.passes.layout import first_layer, rule_before_decoder
from deos_fx.passes.observe_block import bias_block
from deos_fx.policy import Policy
from deos_fx.reduction import split_site

__all__ = ["DecodeSpace", "decode_spaces", "lower_decode"]


@dataclass(frozen=True)
class DecodeSpace:
    """The layers behind one reduction.

    Attributes:
        first_layer: Index of the first decoder layer in this space.
        position: How its positions follow: ``keep`` those of the space before, ``compact`` or
            ``grid``.
        biased: Whether its keys carry a mass bias.
    """

    first_layer: int
    position: str
    biased: bool

    @property
    def moved(self) -> bool:
        """Whether its tokens have positions of their own."""
        return self.position != "keep"


def lower_decode(graph_module: fx.GraphModule, spaces: Sequence[DecodeSpace]) -> fx.GraphModule:
    """Give the layers of every token space their own mask, positions and key bias.

    For space k (from 1) the graph gains the inputs ``attention_mask_k`` [B, M_k + t] if the model
    takes a mask, ``position_ids_k`` [B, t] if tokens have moved and ``key_bias_k``
    [B, M_k + t] if attention is biased by mass.

    Args:
        graph_module: A captured, annotated graph of a call with a filled cache. Changed in place.
        spaces: The spaces in order of depth.

    Returns:
        The same graph module.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    layers = [node for name, node in nodes.items() if name.startswith("decoder_")]
    tables = position_tables(graph_module)
    ends = [*(space.first_layer for space in spaces[1:]), len(layers)][: len(spaces)]
    replaced: dict[fx.Node, fx.Node] = {}
    for k, (space, end) in enumerate(zip(spaces, ends, strict=True), start=1):
        # To keep positions is to keep those of the space before, which may have moved.
        same = [] if space.moved else [nodes["position_ids"], *tables]
        before = {node: replaced[node] for node in same if node in replaced}
        replaced, key_bias = _inputs_of(graph_module.graph, nodes, tables, k, space)
        replaced |= before
        for node in layers[space.first_layer : end]:
            node.args, node.kwargs = fx.node.map_arg(
                (node.args, node.kwargs), partial(_latest, replaced)
            )
            bias_block(graph_module, node, key_bias)
    return finish(graph_module)


def decode_spaces(policy: Policy) -> tuple[DecodeSpace, ...]:
    """The token spaces that a policy leaves in the decoder, in order of depth.

    All reductions before the decoder shorten the prompt together: they leave one space.
    """
    spaces: list[DecodeSpace] = []
    merged = False
    for reduction in policy.reductions:
        stage, _ = split_site(reduction.site)
        merged = merged or reduction.transfers
        biased = merged and reduction.mass_bias > 0 and stage != "vision"
        if stage == "decoder":
            spaces.append(DecodeSpace(first_layer(reduction.site), reduction.position, biased))
        else:
            spaces = [DecodeSpace(0, rule_before_decoder(policy.reductions), biased)]
    return tuple(spaces)


def _inputs_of(
    graph: fx.Graph, nodes: dict[str, fx.Node], tables: list[fx.Node], k: int, space: DecodeSpace
) -> tuple[dict[fx.Node, fx.Node], fx.Node | None]:
    """New graph inputs of a space, the masks and rotary tables made from them, the key bias."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    ids = nodes["position_ids"]
    replaced: dict[fx.Node, fx.Node] = {}
    key_bias = None
    with graph.inserting_after(inputs[-1]):
        if space.biased:
            key_bias = graph.placeholder(f"key_bias_{k}")
        if space.moved:
            replaced[ids] = graph.placeholder(f"position_ids_{k}")
        if "attention_mask" in nodes:
            replaced[nodes["attention_mask"]] = graph.placeholder(f"attention_mask_{k}")
    for node in nodes.values():
        is_mask = node.meta.get("prompt_axes") == MASK
        if is_mask or (space.moved and node in tables):
            with graph.inserting_before(nodes[f"decoder_{space.first_layer}"]):
                again = graph.node_copy(node, lambda value: replaced.get(value, value))
            if is_mask:
                # The mask is as wide as this layer's cache.
                again.kwargs = {**again.kwargs, "layer_idx": space.first_layer}
            replaced[node] = again
    return replaced, key_bias


def _latest(replaced: dict[fx.Node, fx.Node], value: fx.Node) -> fx.Node:
    return replaced.get(value, value)
