"""Walk through the sites of a policy in order of depth, and let a form of reductions emit nodes.

    vision.0 ... vision.n -> projector -> the prompt -> decoder.0 ... decoder.n

There are three kinds of sites:

1. In the tower and at the projector, each image is reduced alone. What is left of all images of a
   prompt then enters the prompt. In a tower inside of an opaque encoder, groups of patches are
   reduced, and the visual tokens made of the others leave the prompt afterwards.
2. Where the image encoder is opaque, its features are already in the prompt when they can first be
   reduced. What is left of each image is taken out of the prompt and reduced alone, too.
3. In the decoder, all visual tokens of a prompt are reduced together.

The walk finds the tokens at a site, their features, and what reads them. A static graph then gets
operators and shorter token spaces, a relaxed one modules and gates: `lower_reductions` and
`insert_relaxed` say what their form emits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from deos_fx import tokens
from deos_fx.attention.observation import OBSERVED
from deos_fx.passes.analyse.annotate_token_spaces import padding_node
from deos_fx.passes.analyse.sites import Encoder, Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import block_after, blocks_of, has_streams, users_after
from deos_fx.passes.lower.emitter import Emitter
from deos_fx.passes.lower.steps import Group, Inside, Place, Step
from deos_fx.passes.lower.token_space import insert_visual_positions
from deos_fx.passes.observe.site_features import PromptFeatures, PromptText, TowerFeatures
from deos_fx.tokens.layout import PromptLayout

__all__ = ["SiteWalk"]


class SiteWalk(ABC):
    """Goes from site to site and finds the tokens, their features, and what reads them.

    A form of reductions implements the abstract methods. They are called while the graph's place of
    insertion is the site, except for `enter_prompt`, which chooses its own.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        layout: The prompts.
        steps: The reductions, in order of depth.

    Attributes:
        visual: Positions [B, V] of the visual tokens in the prompt, as it is at this point.
        cells: Image, row and column of every token of one image: a constant [V, 3] until scores
            choose tokens.
        grid: Image, row and column of every visual token of a prompt.
        alive: Gates of the visual tokens, [I, V] before the decoder and [B, V] in it; None while
            every gate is 1.
        inside: What is left in the tower of an encoder that is one node; None while all is.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        sites: Sites,
        layout: PromptLayout,
        steps: Sequence[Step],
    ) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.sites = sites
        self.layout = layout
        self.steps = steps
        self.emitter = Emitter(graph_module)
        self.call = self.emitter.call
        # Nodes of the captured graph by name; what is emitted later is not among them.
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.visual = insert_visual_positions(graph_module, sites, layout, self.call)
        self.cells: fx.Node | torch.Tensor = layout.grid_tensor(1)
        self.grid: fx.Node | torch.Tensor = layout.grid_tensor(layout.images)
        self.alive: fx.Node | None = None
        self.inside: Inside | None = None
        # The text as it enters the prompt; in the decoder, the text as it enters the first layer.
        self._text = PromptText(
            self.call, self.nodes[sites.embeddings], self.visual, padding_node(graph_module)
        )
        # Features of the latest site in the tower.
        self._in_tower: TowerFeatures | None = None
        # Sites that have been reduced: no feature may be observed across one of them.
        self._done: list[str] = []
        self._coming = list(reversed(steps))  # The next one is the last.

    def walk(self) -> fx.GraphModule:
        """Insert all reductions, and return the graph module."""
        # Steps are in order of depth, so those in the decoder are the last ones.
        before_decoder = [step for step in self.steps if step.stage != "decoder"]
        opaque = self.sites.encoder is Encoder.OPAQUE
        inside = [step for step in before_decoder if opaque and step.stage == "vision"]
        if inside:
            # Kind 1, in an encoder that is one node.
            self.inside = self.reduce_inside(inside)
            del self._coming[-len(inside) :]
        # Kinds 1 and 2.
        for step in before_decoder[len(inside) :]:
            self._at(step, self._at_merged if opaque else self._at_images)
        # Images that are reduced in the prompt shorten it themselves.
        if before_decoder and (not opaque or len(inside) == len(before_decoder)):
            self.enter_prompt(before_decoder)
        in_decoder = self.steps[len(before_decoder) :]
        if in_decoder:
            self._enter_decoder()
        # Kind 3.
        for step in in_decoder:
            self._at(step, self._at_prompt)
        output = self.graph.output_node()
        fields: Any = output.args[0]
        output.args = ({**fields, **self.outputs()},)
        return finish(self.graph_module)

    # *** what differs between forms ***

    @abstractmethod
    def reduce_images(
        self, step: Step, place: Place, put_back: Callable[[fx.Node], fx.Node]
    ) -> None:
        """Reduce every image alone: its patches in the tower, or its features after it.

        Args:
            step: The reduction.
            place: The tokens of images.
            put_back: Lets everything after the site read other tokens, and returns the hidden
                states, to which it adds the class tokens itself.
        """

    @abstractmethod
    def reduce_inside(self, steps: Sequence[Step]) -> Inside:
        """Reduce groups of patches in the tower of an image encoder that is one node."""

    @abstractmethod
    def reduce_merged(self, step: Step, groups: Sequence[Group]) -> None:
        """Reduce images that are already in the prompt, each of them alone."""

    @abstractmethod
    def enter_prompt(self, steps: Sequence[Step]) -> None:
        """Turn what is left of each image into what is left of a prompt, before the decoder.

        Args:
            steps: The reductions before the decoder.
        """

    @abstractmethod
    def reduce_prompt(self, step: Step, place: Place) -> None:
        """Reduce all visual tokens of a prompt together, after a decoder layer."""

    @abstractmethod
    def reread(self, features: TowerFeatures, name: str) -> fx.Node:
        """Read a feature of the latest site in the tower again, at the tokens that it left.

        Args:
            features: The features of that site.
            name: The feature.
        """

    @abstractmethod
    def outputs(self) -> dict[str, Any]:
        """Return the fields that the graph's output gains."""

    def padding(self) -> fx.Node | None:
        """Return the 2-D attention mask of the prompt at this point; None if the call has none."""
        return padding_node(self.graph_module)

    def until(self, stage: str) -> fx.Node | None:
        """Return the last node that a reduction has to reach: the next one may peek into it."""
        after = next((step for step in reversed(self._coming) if step.stage == stage), None)
        return None if after is None else block_after(self.nodes[after.site.node], stage)

    # *** the kinds of sites ***

    def _at(self, step: Step, reduce: Callable[[Step], None]) -> None:
        """Insert one reduction."""
        self.emitter.site = step.site.name
        self._coming.pop()
        reduce(step)
        self._done.append(step.site.name)

    def _at_images(self, step: Step) -> None:
        """Find the images' own tokens in the tower or after it, and reduce them."""
        features = self._image_features(step, self.cells, self.layout.images)
        # If the block is observed, its hidden states are a part of its output, and another node.
        whole, anchor = features.hidden, features.anchor
        class_tokens = self.sites.class_tokens
        if step.stage == "projector":
            # Case: the projector. A block of the tower is observed, but the features are reduced,
            # which have no class tokens.
            whole = self.nodes[self.sites.features]
            anchor, class_tokens = whole.next, 0
        # Found before anything is emitted: the reduction itself goes on reading the unreduced
        # tokens.
        users = users_after(whole, anchor)

        def put_back(reduced: fx.Node) -> fx.Node:
            if class_tokens:
                reduced = self.call(tokens.with_patches, whole, reduced, class_tokens)
            for user in users:
                user.replace_input_with(whole, reduced)
            return reduced

        with self.graph.inserting_before(anchor):
            own = self.call(tokens.without_class, whole, class_tokens) if class_tokens else whole
            self.reduce_images(step, Place(whole, own, features), put_back)
        # For a reduction at the projector that observes the same block.
        self._in_tower = features

    def _at_merged(self, step: Step) -> None:
        """Find the tokens of images that are already in the prompt, and reduce each image alone."""
        hidden = self.nodes[self.sites.features]
        # After both the prompt and the visual tokens' positions.
        with self.graph.inserting_before(max(hidden, self.visual).next):
            # Images of one size are rows of one tensor, so they are reduced together.
            alike = self.layout.alike()
            self.reduce_merged(step, [self._group(step, hidden, one) for one in alike])

    def _group(self, step: Step, hidden: fx.Node, images: Sequence[int]) -> Group:
        """Take the tokens of the images of one size out of the prompts [B, N, d]."""
        count, columns = len(images), None
        if count < self.layout.images:
            # Case: images of several sizes. Take the visual tokens of these images alone.
            sizes = self.inside.sizes if self.inside else self.layout.sizes
            of_images = torch.arange(sum(sizes)).split(sizes)
            columns = torch.cat([of_images[i] for i in images])

        def of_these(value: fx.Node) -> fx.Node:
            return value if columns is None else self.call(torch.index_select, value, 1, columns)

        visual, cells, mass = self.visual, self.cells, None
        if self.inside is not None:
            # Case: what the tower has left. Each image has cells and masses of its own.
            kept, mass = self.inside.kept, self.inside.mass
            visual = self.call(tokens.take, visual, kept)
            whole = self.layout.grid_tensor(self.layout.images)[None]
            cells = of_these(self.call(tokens.known_of_kept, whole, kept))
            cells = self.call(tokens.of_images, cells, count)
            mass = None if mass is None else self.call(tokens.of_images, of_these(mass), count)
        elif columns is not None:
            # These images have one grid in common, that of the first of them.
            cells = self.layout.grid_tensor(self.layout.images)[of_images[images[0]]]
        visual = of_these(visual)
        features = self._image_features(step, cells, count)
        # [B, N, d] -> the visual tokens of prompts -> those of images [I, V, d]
        own = self.call(tokens.of_images, self.call(tokens.take, hidden, visual), count)
        return Group(hidden, own, features, images, columns, cells, mass)

    def _enter_decoder(self) -> None:
        """Let later reductions see the text as it enters the first decoder layer.

        What was reduced before has changed the visual tokens' positions and the mask.
        """
        first = blocks_of(self.graph, "decoder")[0]
        with self.graph.inserting_before(first):
            # In the static form, this emits a mask of what is left.
            padding = self.padding()
            embeddings: Any = self._in_row(first.args[0], first)
        self._text = PromptText(
            self.call, embeddings, self.visual, padding, self.alive, before=first
        )

    def _at_prompt(self, step: Step) -> None:
        """Find the visual tokens after a decoder layer, and reduce them."""
        features = self._prompt_features(step)
        hidden = features.hidden
        with self.graph.inserting_before(features.anchor):
            own = self.call(tokens.take, hidden, self.visual)
            own = self._in_row(own, self.nodes[step.site.node])
            self.reduce_prompt(step, Place(hidden, own, features))

    def _in_row(self, value: Any, layer: fx.Node) -> Any:
        """Emit tokens as vectors [B, N, d], where a layer has several streams of hidden states."""
        return self.call(tokens.streams_in_row, value) if has_streams(layer) else value

    # *** features ***

    def _image_features(
        self, step: Step, cells: fx.Node | torch.Tensor, images: int
    ) -> TowerFeatures:
        """Make the features of a reduction of images; every block is observed only once.

        A reduction after the last block and one at the projector observe the same block. The
        features of the second are observed at the first, and read at the tokens that are left.

        Args:
            step: The reduction.
            cells: Image, row and column of the tokens of an image.
            images: Number of images of a prompt that are reduced.
        """
        at_projector = step.stage == "projector"
        block = self.nodes[self.sites.tower_block if at_projector else step.site.node]
        needs = step.needs
        # Features that are not observed in the block of this site.
        makers: dict[str, Callable[[], Any]] = {"grid": lambda: cells, "sides": self._sides}
        in_tower = self._in_tower
        if at_projector and in_tower is not None and in_tower.block is block:
            # Case: the second of the two. Its observations are those of the first.
            makers |= {
                name: partial(self.reread, in_tower, name) for name in needs & OBSERVED.keys()
            }
        elif block.name == self.sites.tower_block:
            # Case: perhaps the first of the two. It observes for the second as well.
            for later in self.steps:
                if later.stage == "projector":
                    needs |= later.needs & OBSERVED.keys()
        return TowerFeatures(
            self.graph_module,
            step.site.name,
            block,
            needs - makers.keys(),
            self.call,
            class_tokens=self.sites.class_tokens,
            alive=self.alive,
            text=self._text,
            images=images,
            reduced=self._done,
            makers=makers,
        )

    def _prompt_features(self, step: Step) -> PromptFeatures:
        """Make the features of a reduction in the decoder."""
        # The grid at this site: later sites replace the attribute.
        grid = self.grid
        return PromptFeatures(
            self.graph_module,
            step.site.name,
            self.nodes[step.site.node],
            step.needs,
            self.call,
            visual=self.visual,
            padding=self.padding,
            text=self._text,
            alive=self.alive,
            reduced=self._done,
            makers={"grid": lambda: grid, "sides": self._sides},
        )

    def _sides(self) -> torch.Tensor:
        """Return rows and columns of an image, all of one size."""
        return torch.tensor([self.layout.grid])
