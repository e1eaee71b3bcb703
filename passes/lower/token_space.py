"""Where the visual tokens are in a prompt: in the original token space, and in each later one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from deos_fx import tokens
from deos_fx.models.families import MARKS, is_encoder
from deos_fx.models.upstream import CACHE
from deos_fx.passes.analyse.annotate_token_spaces import padding_node, position_tables
from deos_fx.passes.analyse.sites import Sites
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.lower.emitter import Emitter
from deos_fx.passes.lower.open_space import OpenSpaces, reindexed
from deos_fx.passes.notes import annotate, note_of, note_of_graph
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.passes.rewrite.continue_text import continues
from deos_fx.tokens.layout import PromptLayout

__all__ = ["TokenSpace", "insert_visual_positions"]

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
    marks = graph.find_nodes(op="placeholder", target=MARKS)
    (input_ids,) = marks or graph.find_nodes(op="placeholder", target="input_ids")
    given = input_ids, layout.image_token, sum(layout.sizes)
    if not layout.separators:
        with graph.inserting_after(input_ids):
            return call(tokens.visual_positions, *given)
    # Case: some placeholders are ends of rows. Their ids are those of other placeholders, but their
    # features are one learned vector.
    encoder = next(node for node in graph.nodes if is_encoder(node))
    core: Any = graph_module.get_submodule(str(encoder.target)).core
    graph_module.register_parameter(_NEWLINE, getattr(core, _NEWLINE))
    merged = next(node for node in graph.nodes if node.name == sites.features)
    with graph.inserting_before(merged.next):
        ends = call(tokens.is_separator, merged, graph.get_attr(_NEWLINE))
        return call(tokens.visual_positions, *given, ends)


class TokenSpace:
    """The token space that the prompt is in. Every reduction of the prompt opens a new one.

    Args:
        emitter: Emits nodes.
        visual: Positions [B, V] of the visual tokens in the original prompt.
        images: Number of images of a prompt.

    Attributes:
        visual: Positions [B, V] of the visual tokens in this space.
        origin: Original prompt positions [B, M] of its tokens; None in the original space.
        left: What decoding needs to know of every space so far.
    """

    def __init__(self, emitter: Emitter, visual: fx.Node, images: int) -> None:
        self.emitter = emitter
        self.call = emitter.call
        self.visual = visual
        self.origin: fx.Node | None = None
        self.left: list[dict[str, fx.Node]] = []
        # The visual tokens of the original prompt, in which the rule ``grid`` counts.
        self._placeholders = visual
        self._images = images
        # Made when it is first asked for, once for each space.
        self._padding: fx.Node | None = None
        (self._ids,) = emitter.graph.find_nodes(op="placeholder", target="position_ids")
        # Whether the layers see earlier turns, whose tokens have moved up by rules of their own.
        layers = blocks_of(emitter.graph, "decoder").values()
        self._continues = any(continues(emitter.graph_module, layer) for layer in layers)
        self._spaces = OpenSpaces(emitter.graph)
        self._tables = position_tables(emitter.graph_module)
        self._in_front = note_of_graph(emitter.graph_module).in_front
        # The position ids of every space so far: a rotary table may read any of them.
        self._all_ids = {self._ids}

    def padding(self) -> fx.Node | None:
        """Return the 2-D attention mask in this space; None if the call has none."""
        mask = padding_node(self.emitter.graph_module)
        if mask is None or self.origin is None:
            return mask
        if self._padding is None:
            self._padding = self.call(tokens.take, mask, self.origin)
        return self._padding

    def shorten(
        self,
        hidden: fx.Node,
        kept: fx.Node,
        reduced: fx.Node | None,
        *,
        position: str,
        bias: Callable[[fx.Node, fx.Node], fx.Node | None],
        enter: Callable[[fx.Node], None],
        until: fx.Node | None,
        alive: fx.Node | None = None,
    ) -> None:
        """Shorten the prompt to text and kept tokens, for everything after this point.

        Args:
            hidden: The prompt [B, N, d] in the current space.
            kept: Indices [B, K] into its visual tokens.
            reduced: The reduced tokens [B, K, d]; None if the kept ones are unchanged.
            position: The rule for positions: ``keep``, ``compact`` or ``grid``.
            bias: Emits the bias of later attention from the visual tokens' positions and the
                hidden states in the new space; it may return None.
            enter: Called with every layer in the new space, after it has got its arguments.
            until: The last node that has to be rewritten before the prompt is shortened again;
                None if it will not be.
            alive: Gates [B, K] of the kept tokens in a relaxed graph: closed ones count as dropped
                in the rules for positions.
        """
        if self._in_front:
            # Visual tokens in front of the text take no positions of it, so no rule changes any.
            position = "keep"
        # 1. The hidden states in the new space.
        index = self.call(tokens.kept_in_prompt, self.visual, kept, hidden)
        shortened = self.call(tokens.take, hidden, index)
        self.visual = self.call(tokens.visual_after, self.visual, kept)
        if reduced is not None:
            shortened = self.call(tokens.put, shortened, self.visual, reduced)
        # 2. Original positions: `index` itself in the first space, else looked up in the last one.
        known = self.origin
        origin = index if known is None else self.call(tokens.take, known, index)
        self.origin, self._padding = origin, None
        # 3. Position ids and rotary tables.
        trailing = None
        is_open = None
        if alive is not None and position != "keep":
            is_open = self.call(tokens.are_open, alive, self.visual, shortened)
        if position == "grid":
            where = (origin, self._placeholders, self._ids, self._images, is_open)
            trailing = self.call(tokens.trailing, *where[: 4 if is_open is None else 5])
        replaced = self._new_positions(position, index, origin, trailing, is_open)
        # 4. The rest of the graph: re-indexed values, positions, and the bias of later attention.
        key_bias = bias(self.visual, shortened)

        def enter_layer(layer: fx.Node) -> None:
            # Without a bias, too: its mask may have that of the space before.
            bias_block(self.emitter.graph_module, layer, key_bias, shortened)
            if continues(self.emitter.graph_module, layer):
                layer.update_kwarg("places", origin)
            enter(layer)

        opened = (hidden, shortened, index, replaced, self.emitter.suffix)
        self._spaces.open(*opened, until=until, enter=enter_layer)
        # 5. What decoding needs to know of the space.
        left = {"origin": origin} | ({"key_bias": key_bias} if key_bias else {})
        if trailing is not None:
            left["shift"] = self.call(tokens.shift_of, trailing)
        self.left.append(left)

    def _new_positions(
        self,
        position: str,
        index: fx.Node,
        origin: fx.Node,
        trailing: fx.Node | None,
        is_open: fx.Node | None,
    ) -> dict[fx.Node, fx.Node]:
        """Emit position ids of the new space and the rotary tables made from them.

        A table is made again also where positions are kept: it is as cheap as taking its rows, and
        runtimes fuse rotary embeddings only whose table is made from position ids.

        Args:
            position: The rule for positions.
            index: Positions [B, M] of the kept tokens in the space before.
            origin: Their original prompt positions [B, M].
            trailing: Under the rule ``grid``: flags [B, N] of the dropped tokens at the ends of
                images.
            is_open: Flags [B, M] of the tokens that are not about to be dropped, in a relaxed
                graph.

        Returns:
            Position ids and tables of the current space -> those of the new space.
        """
        # A later table is given the new ids when the space is opened.
        tables = [table for table in self._tables if table < origin]
        if position == "keep" and not tables:
            return {}
        ids, before = self._ids, self._spaces.here(self._ids)
        self._all_ids.add(before)
        # Always from the positions of the original prompt, never from those of the space before:
        # both rules count what has been dropped so far in all.
        if position == "keep":
            moved = reindexed(self.emitter.graph, before, index, self.emitter.suffix)
        elif trailing is None and is_open is not None:
            moved = self.call(tokens.relaxed_positions, ids, origin, is_open)
        elif trailing is None:
            moved = self.call(tokens.compact_positions, ids, origin)
        else:
            moved = self.call(tokens.grid_positions, ids, trailing, origin)
        if position != "keep" and self._continues:
            (cache,) = self.emitter.graph.find_nodes(op="placeholder", target=CACHE)
            moved = self.call(tokens.after_earlier, moved, cache, len(self.left) + 1)
        annotate(moved, axes=note_of(ids).axes)
        replaced = {before: moved}
        for table in tables:
            replaced[self._spaces.here(table)] = self.emitter.graph.node_copy(
                table, lambda node: moved if node in self._all_ids else node
            )
        return replaced
