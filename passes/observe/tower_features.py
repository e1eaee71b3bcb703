"""Features of an image's patches, in the vision tower or after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from deos_fx import tokens
from deos_fx.passes.observe.features import Call, SiteFeatures
from deos_fx.passes.observe.observe_block import AskedNodes
from deos_fx.passes.observe.prompt_text import PromptText

__all__ = ["TowerFeatures"]


class TowerFeatures(SiteFeatures):
    """Features of each image's patches, in the vision tower or after it.

    In addition to observations of attention there are ``class_token`` [I, 1, d] at sites of the
    tower, and of the prompt ``text_tokens`` [I, T, d] with ``text_mask`` [I, T].

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
        call: Call,
        *,
        class_tokens: int,
        alive: fx.Node | None = None,
        text: PromptText | None = None,
        images: int = 1,
        **others: Any,
    ) -> None:
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
            votes = None
            if self.alive is not None:
                votes = self.call(tokens.tower_votes, self.alive, self.class_tokens)
            return None, votes, None
        kind = "no CLS token" if queries == "class" else "no text"
        raise ValueError(f"{self.site} cannot observe attention of {queries}: it has {kind}.")

    def _of_visual(self, name: str, seen: fx.Node) -> Any:
        """Read an observation at the patches."""
        return self.call(tokens.without_class, seen, self.class_tokens)

    def _other(self, name: str) -> Any:
        """Make a feature of the CLS token or of the prompts' text."""
        if name == "class_token" and self.class_tokens == 1 and self.site != "projector":
            return self.call(tokens.class_feature, self.hidden)
        if name == "text_tokens" and self.text is not None:
            return self.call(tokens.for_images, self.text.tokens, self.images)
        if name == "text_mask" and self.text is not None:
            return self.call(tokens.for_images, self.text.question, self.images)
        return super()._other(name)
