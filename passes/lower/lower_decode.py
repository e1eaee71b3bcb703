"""Lower the decode graph: each layer attends to its own cache, and their lengths differ.

Nothing is reduced while decoding. In the layers of each token space, a new token needs only a mask
as wide as their caches and, where tokens have moved, its position in that space.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from deos_fx.models.upstream import CACHE
from deos_fx.passes.analyse.annotate_token_spaces import kind_of_mask, position_tables
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import attends, blocks_of
from deos_fx.passes.notes import note_of, note_of_graph
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.policy.policy import Policy
from deos_fx.policy.site import first_layer, split_site
from deos_fx.tokens.layout import rule_before_decoder

__all__ = ["DecodeSpace", "decode_spaces", "lower_decode"]


@dataclass(frozen=True)
class DecodeSpace:
    """The layers after one reduction.

    Attributes:
        first_layer: Index of the first decoder layer in this space.
        position: The rule for its positions: ``keep`` (those of the space before), ``compact`` or
            ``grid``.
        biased: Whether its keys carry a mass bias.
    """

    first_layer: int
    position: str
    biased: bool

    @property
    def moved(self) -> bool:
        """Return whether its tokens have positions of their own."""
        return self.position != "keep"


def lower_decode(graph_module: fx.GraphModule, spaces: Sequence[DecodeSpace]) -> fx.GraphModule:
    """Give the layers of every token space their own mask, positions and key bias.

    For space k (from 1) the graph gains the inputs ``attention_mask_k`` [B, M_k + t] if the model
    takes a mask, ``position_ids_k`` [B, t] if tokens have moved, ``key_bias_k`` [B, M_k + t] if
    attention is biased by mass, and ``key_positions_k`` [B, M_k + t] if layers see a window.

    Args:
        graph_module: A captured, annotated graph of a call with a filled cache. Changed in place.
        spaces: The spaces in order of depth.

    Returns:
        The same graph module.
    """
    if note_of_graph(graph_module).in_front:
        # Visual tokens in front of the text take no positions of it, so none have moved.
        spaces = [replace(space, position="keep") for space in spaces]
    # As they are now: the nodes of every space are made from the original ones.
    nodes = {node.name: node for node in graph_module.graph.nodes}
    layers = list(blocks_of(graph_module.graph, "decoder").values())
    tables = position_tables(graph_module)
    masks = [node for node in nodes.values() if note_of(node).is_mask]
    # The layers of a space end where the next space begins. Layers before the first space stay as
    # they are.
    ends = [*(space.first_layer for space in spaces[1:]), len(layers)][: len(spaces)]
    replaced: dict[fx.Node, fx.Node] = {}
    for k, (space, end) in enumerate(zip(spaces, ends, strict=True), start=1):
        # Under the rule ``keep``, positions are those of the space before, which may have moved.
        same = [] if space.moved else [nodes["position_ids"], *tables]
        before = {node: replaced[node] for node in same if node in replaced}
        replaced, key_bias = _inputs_of(graph_module, nodes, layers, masks, tables, k, space)
        replaced |= before
        hidden: Any = layers[space.first_layer].args[0]
        for node in layers[space.first_layer : end]:
            node.args, node.kwargs = fx.node.map_arg(
                (node.args, node.kwargs), partial(_latest, replaced)
            )
            # Only now: the bias is added to the mask that the layer has in this space.
            bias_block(graph_module, node, key_bias, hidden)
    return finish(graph_module)


def decode_spaces(policy: Policy) -> tuple[DecodeSpace, ...]:
    """List the token spaces that a policy leaves in the decoder, in order of depth.

    All reductions before the decoder shorten the prompt together and leave one space.

    Args:
        policy: The policy.

    Returns:
        The spaces after the original one.
    """
    spaces: list[DecodeSpace] = []
    merged = False
    for reduction in policy.reductions:
        stage, _ = split_site(reduction.site)
        # Until a reduction moves content between tokens, every mass is 1 and there is no bias.
        merged = merged or reduction.transfers
        # Masses that arise in the tower bias the attention of the tower only.
        biased = merged and reduction.mass_bias > 0 and stage != "vision"
        if stage == "decoder":
            spaces.append(DecodeSpace(first_layer(reduction.site), reduction.position, biased))
        else:
            # The last reduction before the decoder says whether keys are biased.
            spaces = [DecodeSpace(0, rule_before_decoder(policy.reductions), biased)]
    return tuple(spaces)


def _inputs_of(
    graph_module: fx.GraphModule,
    nodes: dict[str, fx.Node],
    layers: list[fx.Node],
    masks: list[fx.Node],
    tables: list[fx.Node],
    k: int,
    space: DecodeSpace,
) -> tuple[dict[fx.Node, fx.Node], fx.Node | None]:
    """Add the inputs of a space, and the masks and rotary tables made from them.

    Args:
        graph_module: The graph. Changed in place.
        nodes: All nodes by name, as they were before the first space.
        layers: The decoder layers.
        masks: What makes masks.
        tables: The rotary tables.
        k: Number of the space, from 1.
        space: The space.

    Returns:
        Old node -> node of the space, and the node of the key bias, if there is one.
    """
    graph = graph_module.graph
    # Placeholders stand before all other nodes, the new ones in the order of the spaces.
    inputs = graph.find_nodes(op="placeholder")
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
    # Masks that are not plain: one for the layers with a window, and one for all others.
    windows: dict[_Window | None, fx.Node] = {}
    for node in sorted([*masks, *tables]):
        is_mask = note_of(node).is_mask
        if is_mask and not note_of(node).plain:
            # Case: a mask of windows, of blocks of image tokens, or of padding.
            if _is_of_attention(node):
                window = _window_of(graph_module, node)
                if window not in windows:
                    windows[window] = _mask_of_space(graph_module, node, replaced, k, space)
                replaced[node] = windows[window]
        elif is_mask or (space.moved and node in tables):
            # Case: a plain causal mask, or a rotary table of positions that have moved.
            # Copies, so that earlier layers keep theirs.
            with graph.inserting_before(layers[space.first_layer]):
                again = graph.node_copy(node, lambda value: replaced.get(value, value))
            if is_mask:
                # The mask is as wide as this layer's cache.
                again.kwargs = {**again.kwargs, "layer_idx": _layer_of(node, space)}
            replaced[node] = again
    return replaced, key_bias


class _Window(NamedTuple):
    """What a token sees of what is before it.

    Attributes:
        size: A number of positions, its own included.
        chunked: Whether these are those of its chunk, of which a row has one after the other from
            its first real token on; otherwise they are the last ones.
    """

    size: int
    chunked: bool

    def sees(self, queries: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        """Return flags of the keys in the window of each query.

        Args:
            queries: Original positions of queries.
            keys: Those of keys, in a shape that can be broadcast with that of the queries, as the
                next one.
            padding: How many positions of a row are padding on its left.
        """
        if self.chunked:
            same = (queries - padding) // self.size == (keys - padding) // self.size
            return same & (keys <= queries)
        distance = queries - keys
        return (distance >= 0) & (distance < self.size)


class WindowMask(nn.Module):
    """Makes the mask of one kind of layers for a cache from which tokens were dropped.

    The prompt's own blocks (images whose tokens see each other in both directions) do not matter:
    a new token sees everything before it. A window is one of positions in the original prompt.

    Args:
        config: The text model's config.
        window: What a token sees; None for all.
    """

    def __init__(self, config: PreTrainedConfig, window: _Window | None) -> None:
        super().__init__()
        self.config = config
        self.window = window

    def forward(
        self, *, inputs_embeds: Tensor, layer_idx: int, **kwargs: Any
    ) -> Tensor | BlockMask | None:
        """Make a mask of the kind that transformers makes.

        Args:
            inputs_embeds: Embeddings [B, t, d] of the new tokens.
            layer_idx: Index of a layer of this kind.
            **kwargs: The cache, ``attention_mask`` [B, M + t] and, if there is a window,
                ``key_positions`` [B, M + t], the original positions of all keys that the layer has
                seen.

        Returns:
            A boolean, additive or block mask, or None, as the attention implementation wants it.
        """
        positions = kwargs.pop("key_positions", None)
        cache, padding = kwargs[CACHE], kwargs.get("attention_mask")
        # Causality and padding, in the form that the attention implementation wants.
        mask: Any = create_causal_mask(
            self.config, inputs_embeds, padding, cache, layer_idx=layer_idx
        )
        if self.window is None:
            return mask
        left = _left_padding(positions, padding)
        # The cache of a layer with a window may hold fewer keys than the layer has seen.
        new = inputs_embeds.shape[1]
        held, _ = cache.get_mask_sizes(new, layer_idx)
        if isinstance(mask, BlockMask):
            # Case: flex attention.
            in_window = and_masks(mask.mask_mod, self._in_window(positions, left, new, held))
            batch, device = len(positions), positions.device
            return create_block_mask(in_window, batch, None, new, held, device=device)
        # [B, 1, new, held]: queries are the last positions, keys the last that the layer holds.
        queries, keys = positions[:, None, -new:, None], positions[:, None, None, -held:]
        near = self.window.sees(queries, keys, left[:, None, None, None])
        if mask is None or mask.dtype == torch.bool:
            # Case: a boolean mask, or none where nothing is padded.
            return near if mask is None else near & mask
        # Case: an additive mask.
        return mask.masked_fill(~near, torch.finfo(mask.dtype).min)

    def _in_window(
        self, positions: Tensor, left: Tensor, new: int, held: int
    ) -> Callable[..., Tensor]:
        """Make the condition of the window in the form of flex attention."""
        queries, keys, window = positions[:, -new:], positions[:, -held:], self.window
        assert window is not None

        def near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return window.sees(queries[row, query], keys[row, key], left[row])

        return near


def _left_padding(positions: Tensor, padding: Tensor | None) -> Tensor:
    """Return [B] how many tokens of the original prompts are padding on the left.

    Args:
        positions: Original positions [B, N] of tokens; -1 where there is none.
        padding: Flags [B, N] of real tokens, or None.
    """
    if padding is None:
        return torch.zeros_like(positions[:, 0])
    # Padding is text, of which nothing is dropped.
    return ((padding.cumsum(dim=1) == 0) & (positions >= 0)).sum(dim=1)


def _window_of(graph_module: fx.GraphModule, mask: fx.Node) -> _Window | None:
    """Return the window that a mask is for; None if there is none."""
    config, kind = _builder_of(graph_module, mask).config.get_text_config(), kind_of_mask(mask)
    if "chunked" in kind:
        return _Window(config.attention_chunk_size, True)
    return _Window(config.sliding_window, False) if "sliding" in kind else None


def _builder_of(graph_module: fx.GraphModule, mask: fx.Node) -> Any:
    return graph_module.get_submodule(str(_made(mask).target))


def _made(mask: fx.Node) -> fx.Node:
    """Return the node of the function that makes a mask, or the dict that it was taken out of."""
    return mask.all_input_nodes[0] if mask.target is operator.getitem else mask


def _is_of_attention(mask: fx.Node) -> bool:
    """Return whether decoder layers attend with this mask.

    No layer reads a dict of masks itself. Masks of padding, for layers with a state, are about the
    new tokens only, and stay as they are.
    """
    return bool(_layers_that_read(mask)) and not note_of(mask).padding


def _layers_that_read(mask: fx.Node) -> list[int]:
    """Return the indices of the decoder layers that attend with a mask, or keep a state."""
    # A layer with a state may be given the mask of all others as well, and not read it.
    of_padding = note_of(mask).padding
    blocks = (note_of(user).block for user in mask.users if of_padding or attends(user))
    return [block.index for block in blocks if block is not None and block.stage == "decoder"]


def _layer_of(mask: fx.Node, space: DecodeSpace) -> int:
    """Return the first layer of a space that reads a mask, which must be as wide as its cache."""
    of_space = [layer for layer in _layers_that_read(mask) if layer >= space.first_layer]
    return min(of_space, default=space.first_layer)


def _mask_of_space(
    graph_module: fx.GraphModule,
    mask: fx.Node,
    replaced: dict[fx.Node, fx.Node],
    k: int,
    space: DecodeSpace,
) -> fx.Node:
    """Insert the mask of one kind of layers in a space, made from original positions.

    Args:
        graph_module: The graph. Changed in place.
        mask: A mask of this kind in the original space.
        replaced: Old node -> node of the space.
        k: Number of the space.
        space: The space.

    Returns:
        The node.
    """
    graph = graph_module.graph
    made, window = _made(mask), _window_of(graph_module, mask)
    config = _builder_of(graph_module, mask).config.get_text_config()
    names = ("inputs_embeds", "attention_mask", CACHE)
    # Everything else that the original function takes is about the prompt.
    kwargs = {name: made.kwargs[name] for name in names if name in made.kwargs}
    # A method of the model's own is given the length of the cache alone.
    kwargs.setdefault(CACHE, *graph.find_nodes(op="placeholder", target=CACHE))
    kwargs = dict(fx.node.map_arg(kwargs, partial(_latest, replaced)))
    # The window is a distance between original positions, so these become an input.
    if window:
        inputs = graph.find_nodes(op="placeholder")
        with graph.inserting_after(inputs[-1]):
            kwargs["key_positions"] = graph.placeholder(f"key_positions_{k}")
    name = f"{'window' if window else 'mask'}_{k}"
    graph_module.add_submodule(name, WindowMask(config, window))
    arguments = {**kwargs, "layer_idx": _layer_of(mask, space)}
    # After everything that the original mask reads, before anything that reads it.
    with graph.inserting_before(min(made.users)):
        return graph.create_node("call_module", name, (), arguments, name)


def _latest(replaced: dict[fx.Node, fx.Node], value: fx.Node) -> fx.Node:
    """Return the node that takes the place of a value in the current space."""
    return replaced.get(value, value)
