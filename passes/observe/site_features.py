"""Features at both kinds of sites: of an image's patches, and of a prompt's visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from deos_fx import tokens
from deos_fx.passes.graph import blocks_of, has_streams
from deos_fx.passes.observe.features import Emit, Maker, SiteFeatures
from deos_fx.passes.observe.observe_block import AskedNodes

__all__ = ["PromptFeatures", "PromptText", "TowerFeatures"]


@dataclass
class PromptText:
    """The text of prompts, where they are embedded. Reductions keep all of it, in order.

    So positions in the list of text tokens are valid at every site, and what is computed here once
    serves all of them.

    Attributes:
        call: Emits nodes.
        embeddings: Node of the prompts' embeddings [B, N, d].
        visual: Node of the visual tokens' positions [B, V] in them.
        padding: Node of the 2-D attention mask [B, N] in that space, if there is one.
        alive: Node of the gates [B, V] of a relaxed graph.
        before: The node to insert before; None for the current place of insertion.
    """

    call: Emit
    embeddings: fx.Node
    visual: fx.Node
    padding: fx.Node | None = None
    alive: fx.Node | None = None
    before: fx.Node | None = None

    # Each of these becomes a node when it is first asked for, and serves all later sites.

    @cached_property
    def positions(self) -> fx.Node:
        """Return the positions [B, T] of the text."""
        return self._put(tokens.text_tokens, self.visual, self.embeddings)

    @cached_property
    def tokens(self) -> fx.Node:
        """Return the embeddings [B, T, d] of the text."""
        return self._put(tokens.take, self.embeddings, self.positions)

    @cached_property
    def question(self) -> fx.Node:
        """Return flags [B, T]: 1 for text after the images or, without any, for all text."""
        return self._put(tokens.question_votes, self.positions, self.visual, self.padding)

    @cached_property
    def raters(self) -> fx.Node:
        """Return the votes [B, T] of SparseVLM's raters."""
        given = (self.embeddings, self.positions, self.visual, self.question, self.alive)
        return self._put(tokens.rater_votes, *given)

    def _put(self, function: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
        """Emit a node at the place of insertion."""
        if self.before is None:
            # Case: before the decoder. The first site that asks stands before all others.
            return self.call(function, *args)
        # Case: in the decoder. The text is that of the first layer, whichever site asks for it.
        with self.before.graph.inserting_before(self.before):
            return self.call(function, *args)


class TowerFeatures(SiteFeatures):
    """Features of each image's patches, in the vision tower or after it.

    In addition to observations of attention there are ``class_token`` [I, 1, d], at sites in the
    tower, and ``text_tokens`` [I, T, d] with ``text_mask`` [I, T], the text of each image's prompt.

    Args:
        graph_module: The graph. Changed in place.
        site: Name of the site.
        block: Node of the block before the site.
        needs: Names of the features that will be looked up.
        call: Emits nodes.
        class_tokens: Number of tokens in front of the patches.
        alive: Node of the gates [I, V] of a relaxed graph.
        text: The prompts' text.
        images: Images per prompt.
        **others: See `SiteFeatures`.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        site: str,
        block: fx.Node,
        needs: Iterable[str],
        call: Emit,
        *,
        class_tokens: int,
        alive: fx.Node | None = None,
        text: PromptText | None = None,
        images: int = 1,
        **others: Any,
    ) -> None:
        # Before the constructor of the base class, which asks for queries.
        self.class_tokens = class_tokens
        self.alive = alive
        self.text = text
        self.images = images
        super().__init__(graph_module, site, block, needs, call, **others)

    def _ask(self, queries: str, hidden: fx.Node) -> AskedNodes:
        """Emit the queries: the CLS token, or all tokens with equal votes or gates as votes."""
        if queries == "class" and self.class_tokens == 1:
            return self.call(tokens.class_token, hidden), None, None
        if queries == "visual":
            # Case: every token of an image, class tokens included; gates of a relaxed graph are
            # votes.
            votes = None
            if self.alive is not None:
                votes = self.call(tokens.tower_votes, self.alive, self.class_tokens)
            return None, votes, None
        # Case: queries that there are only in the decoder, or a CLS token that this tower lacks.
        kind = "no CLS token" if queries == "class" else "no text"
        raise ValueError(f"{self.site} cannot observe attention of {queries}: it has {kind}.")

    def _of_visual(self, name: str, seen: fx.Node) -> Any:
        """Read an observation at the patches."""
        # [I, c + V, ...] -> [I, V, ...]
        return self.call(tokens.without_class, seen, self.class_tokens)

    def _other(self, name: str) -> Any:
        """Make a feature of the CLS token or of the prompts' text."""
        # The features at the projector have no CLS token, even if their tower has one.
        if name == "class_token" and self.class_tokens == 1 and self.site != "projector":
            return self.call(tokens.class_feature, self.hidden)
        if name == "text_tokens" and self.text is not None:
            return self.call(tokens.for_images, self.text.tokens, self.images)
        if name == "text_mask" and self.text is not None:
            return self.call(tokens.for_images, self.text.question, self.images)
        return super()._other(name)


class PromptFeatures(SiteFeatures):
    """Features of a prompt's visual tokens, after a decoder layer.

    In addition to observations of attention there are ``text_tokens`` [B, T, d], the hidden states
    of the text, with ``text_mask`` [B, T]. Text is everything that is not visual; the mask is 1 for
    text after the images, or for all text if there is none after them. ``normed_tokens`` and
    ``normed_text`` are the hidden states of both after the final norm; ``text_score`` [B, T] is the
    size of the text's keys.

    Args:
        graph_module: The graph. Changed in place.
        site: Name of the site.
        block: Node of the layer before the site.
        needs: Names of the features that will be looked up.
        call: Emits nodes.
        visual: Node of the visual tokens' positions [B, V].
        padding: Emits the 2-D attention mask in the space of the site, if there is one.
        text: The prompt as the first layer gets it.
        alive: Node of the gates [B, V] of a relaxed graph.
        **others: See `SiteFeatures`.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        site: str,
        block: fx.Node,
        needs: Iterable[str],
        call: Emit,
        *,
        visual: fx.Node,
        padding: Maker,
        text: PromptText,
        alive: fx.Node | None = None,
        **others: Any,
    ) -> None:
        # Before the constructor of the base class, which asks for queries.
        self.visual = visual
        self.padding = padding
        self.text = text
        self.alive = alive
        self._positions: fx.Node | None = None
        super().__init__(graph_module, site, block, needs, call, **others)

    def _ask(self, queries: str, hidden: fx.Node) -> AskedNodes:
        """Emit the queries: the last token, the visual tokens, all text, or SparseVLM's raters."""
        if queries == "last":
            # Case: the last token that is no padding.
            return self.call(tokens.last_token, hidden, self.padding()), None, None
        if queries == "visual":
            # Case: the visual tokens, with gates as votes in a relaxed graph.
            return self.visual, self.alive, None
        if queries == "class":
            raise ValueError(f"{self.site} has no CLS token to observe. Use a site of the tower.")
        # Case: all text, or SparseVLM's raters, which are the text tokens that have a vote.
        votes = self.text.raters if queries == "raters" else None
        positions = self._text_positions(hidden)
        if queries == "raters":
            # They also name the keys by which the strongest heads are chosen.
            return positions, votes, self.visual
        padding = self.padding()
        if padding is not None:
            votes = self.call(tokens.text_votes, padding, positions)
        return positions, votes, None

    def _text_positions(self, hidden: fx.Node) -> fx.Node:
        """Return the positions [B, T] of the text in the space of the site."""
        if self._positions is None:
            self._positions = self.call(tokens.text_tokens, self.visual, hidden)
        return self._positions

    def _of_visual(self, name: str, seen: fx.Node) -> Any:
        """Read an observation at the visual tokens; ``text_keys`` at the text."""
        index = self._text_positions(self.hidden) if name == "text_keys" else self.visual
        return self.call(tokens.take, seen, index)

    def _other(self, name: str) -> Any:
        """Make a feature of the text, or of hidden states after the final norm."""
        if name == "text_tokens":
            text = self._taken(self._text_positions(self.hidden))
            return self.call(tokens.streams_in_row, text) if has_streams(self.hidden) else text
        # Flags are by place in the text, so those of the embeddings are valid here.
        if name == "text_mask":
            return self.text.question
        if name == "text_score":
            return self.call(tokens.text_key_size, self["text_keys"], self.text.question)
        if name == "normed_tokens":
            return self._normed(self.visual)
        if name == "normed_text":
            return self._normed(self._text_positions(self.hidden))
        return super()._other(name)

    def _taken(self, index: fx.Node) -> fx.Node:
        """Take the hidden states of tokens."""
        return self.call(tokens.take, self.hidden, index)

    def _normed(self, index: fx.Node) -> fx.Node:
        """Apply the final norm, the module that follows the last layer, to hidden states of tokens.

        Several streams of hidden states are made one by the module before the norm.

        Raises:
            ValueError: If no module follows the last layer, or more than one.
        """
        # Hidden states of an early layer are normed as if they were the last ones (DART compares
        # such).
        *_, last = blocks_of(self.graph_module.graph, "decoder").values()
        hidden = self._taken(index)
        for _ in range(1 + has_streams(self.hidden)):
            after = [user for user in last.users if user.op == "call_module"]
            if len(after) != 1:
                raise ValueError(f"{self.site} has no feature after the final norm: there is none.")
            (last,) = after
            hidden = self.graph_module.graph.call_module(str(last.target), (hidden,))
        return hidden
