"""The text of a prompt, for features that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from deos_fx import tokens
from deos_fx.passes.observe.features import Call

__all__ = ["PromptText"]


@dataclass
class PromptText:
    """The text of prompts, at the embeddings: reductions keep all of it, in order.

    Attributes:
        call: Emits nodes.
        embeddings: Node of the prompts' embeddings [B, N, d].
        visual: Node of the visual tokens' positions [B, V] in them.
        padding: Node of the 2-D attention mask [B, N] in that space, if there is one.
        alive: Node of the gates [B, V] of a relaxed graph.
        before: The node to insert before; None for the current place of insertion.
    """

    call: Call
    embeddings: fx.Node
    visual: fx.Node
    padding: fx.Node | None = None
    alive: fx.Node | None = None
    before: fx.Node | None = None

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
        """Return flags [B, T]: 1 for text after the images, or for all text if none comes after."""
        return self._put(tokens.question_votes, self.positions, self.visual, self.padding)

    @cached_property
    def raters(self) -> fx.Node:
        """Return the votes [B, T] of SparseVLM's raters."""
        given = (self.embeddings, self.positions, self.visual, self.question, self.alive)
        return self._put(tokens.rater_votes, *given)

    def _put(self, function: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
        """Emit a node at the place of insertion."""
        if self.before is None:
            return self.call(function, *args)
        with self.before.graph.inserting_before(self.before):
            return self.call(function, *args)
