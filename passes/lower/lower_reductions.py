"""Lower a policy to static ops: TopK, Gather and MatMul with constant counts.

Each reduction becomes a few named nodes (score, top_k, nearest, merge, ...). What a policy does not
use leaves no node: the graph of a pruning policy has no assignment and no matmul, and no score is
observed that nothing ranks by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from deos_fx import tokens
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import StaticOutput, static_reduce
from deos_fx.models.families import is_encoder
from deos_fx.models.views import has_several_devices
from deos_fx.passes.analyse.check_reduction import check_masks, check_reduction
from deos_fx.passes.analyse.sites import Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import blocks_after
from deos_fx.passes.lower.reduced_encoder import ReducedEncoder, explained, left_in_tower
from deos_fx.passes.lower.reduced_patches import ROLES
from deos_fx.passes.lower.site_walk import SiteWalk
from deos_fx.passes.lower.steps import Group, Inside, Place, Step
from deos_fx.passes.lower.token_space import TokenSpace
from deos_fx.passes.notes import note_of_graph
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.passes.observe.site_features import TowerFeatures
from deos_fx.policy.policy import Policy
from deos_fx.tokens.layout import PromptLayout, grid_after, grid_of_prompt, rule_before_decoder

__all__ = ["Lowering", "lower_reductions"]


def lower_reductions(
    graph_module: fx.GraphModule, sites: Sites, policy: Policy, layout: PromptLayout
) -> fx.GraphModule:
    """Insert every reduction of the policy as static ops.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        policy: The reductions; the empty policy leaves the graph as it is.
        layout: The prompts this graph is for.

    Returns:
        The same graph module. Its output gains ``spaces``: one dict for all reductions before the
        decoder together, and one for each reduction in it. A dict (`SpaceFields`, of nodes) has

        - ``origin`` [B, M], original prompt positions of the tokens that are left;
        - ``key_bias`` [B, M], if masses bias later attention;
        - ``shift`` [B, 1], under the position rule ``grid``: how far later tokens move up.

    Raises:
        ValueError: If a site does not exist, cannot be used or lacks a score the policy needs.
    """
    if policy.is_empty:
        # Case: nothing to insert. The graph stays bit-identical to the model.
        return finish(graph_module)
    check_masks(graph_module, layout.packed)
    # Counts of every reduction for each image, since a ratio keeps more of a larger one:
    # transposed, they are the counts of all images for each reduction.
    counts = zip(*map(policy.counts, layout.sizes), strict=True)
    steps = [
        Step(
            reduction,
            check_reduction(graph_module, sites, reduction, layout),
            required_features(reduction),
            of_images,
        )
        for reduction, of_images in zip(policy.reductions, counts, strict=True)
    ]
    return Lowering(graph_module, sites, layout, steps).walk()


class Part(NamedTuple):
    """What is left of a prompt's images: of those of one size, or of all.

    Attributes:
        kept: Indices [B, K] of the kept tokens among a prompt's visual tokens.
        tokens: The reduced tokens [B, K, d]; None if the kept ones are unchanged.
        mass: Their masses [B, K]; None if all are 1.
    """

    kept: fx.Node
    tokens: fx.Node | None
    mass: fx.Node | None


class Lowering(SiteWalk):
    """Emits static operators, and a shorter token space after each of them.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        layout: The prompts.
        steps: The reductions.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        sites: Sites,
        layout: PromptLayout,
        steps: Sequence[Step],
    ) -> None:
        super().__init__(graph_module, sites, layout, steps)
        self.several_devices = has_several_devices(graph_module)
        self.space = TokenSpace(self.emitter, self.visual, layout.images)
        self.emitter.explain("visual", self.visual)
        # Masses [I, K] before the decoder, [B, K] in it; None while every mass is 1.
        self.mass: fx.Node | None = None
        # [I, K] indices of the image's own tokens that are left; None while all are.
        self.kept: fx.Node | None = None
        # [I, K] indices that the latest site in the tower kept, into the tokens that it was given.
        self.kept_in_tower: fx.Node | None = None

    def padding(self) -> fx.Node | None:
        """Return the 2-D attention mask in the current space; None if the call has none."""
        return self.space.padding()

    def outputs(self) -> dict[str, Any]:
        """Return what decoding needs to know of each space."""
        return {"spaces": self.space.left}

    # *** before the decoder ***

    def reduce_images(
        self, step: Step, place: Place, put_back: Callable[[fx.Node], fx.Node]
    ) -> None:
        """Reduce every image alone: its patches in the tower, or its features after it."""
        # All images have one size here: an encoder that takes several at once is opaque.
        (count,) = set(step.counts)
        reduced = self._operate(step, count, place, self.mass, self._last_of(self.layout.images))
        left = put_back(reduced.tokens)
        kept = reduced.kept
        if self.kept is not None:
            # Case: not the first reduction. Indices into what the one before has kept become
            # indices into the image's own tokens. If tokens may be out of order, a -1 stands for a
            # copy of the CLS token.
            in_order = step.reduction.order == "position"
            compose = tokens.take if in_order else tokens.kept_of_kept
            kept = self.call(compose, self.kept, kept)
        self.cells = self._cells_of_kept(step, count, self.cells, reduced.kept)
        self.kept, self.mass = kept, reduced.mass
        if step.stage == "vision":
            self.kept_in_tower = reduced.kept
            self._bias_tower(step, left)

    def _bias_tower(self, step: Step, left: fx.Node) -> None:
        """Bias the attention of the later blocks of the tower by the masses of their patches."""
        key_bias = self.tower_bias(step.reduction.mass_bias)
        # Without a bias, too: an earlier site may have set one, and tokens have changed.
        for block in blocks_after(left, "vision", self.until("vision")):
            bias_block(self.graph_module, block, key_bias, left)

    def tower_bias(self, beta: float) -> fx.Node | None:
        """Emit the bias [I, c + K] on the attention to patches; None if there is none."""
        if not beta or self.mass is None:
            return None
        return self.call(tokens.patch_bias, self.mass, self.sites.class_tokens, beta)

    def prompt_bias(self, beta: float, visual: fx.Node, hidden: fx.Node) -> fx.Node | None:
        """Emit the bias [B, M] on the attention to the tokens of a prompt; None if there is none.

        Args:
            beta: How strongly masses bias later attention.
            visual: Positions [B, K] of the visual tokens.
            hidden: The prompt [B, M, d]; only its shape is read.
        """
        if not beta or self.mass is None:
            return None
        return self.call(tokens.mass_bias, self.mass, visual, hidden, beta)

    def reread(self, features: TowerFeatures, name: str) -> fx.Node:
        """Read a feature of the latest site in the tower at the tokens that it kept."""
        return self.call(tokens.known_of_kept, features[name], self.kept_in_tower)

    def reduce_inside(self, steps: Sequence[Step]) -> Inside:
        """Reduce groups of patches in the tower; what is left stays in the prompt for now."""
        (encoder,) = (node for node in self.graph.nodes if is_encoder(node))
        whole: Any = self.graph_module.get_submodule(str(encoder.target))
        blocks = note_of_graph(self.graph_module).blocks
        tower = [blocks[block] for block in sorted(blocks) if block.stage == "vision"]
        reduced = ReducedEncoder(whole.core, whole.encode, tower, steps, self.layout)
        self.graph_module.set_submodule(str(encoder.target), reduced)
        with self.graph.inserting_after(encoder):
            # Without transfers, every mass is 1.
            moved = any(step.reduction.gain or step.reduction.residual for step in steps)
            mass = self.call(left_in_tower, encoder, "mass") if moved else None
            kept = self.call(left_in_tower, encoder, "kept")
            for step in steps:
                self.emitter.site = step.site.name
                for role in ROLES:
                    value = self.call(explained, encoder, step.site.name, role)
                    self.emitter.explain(role, value)
        return Inside(kept, mass, steps[-1].counts)

    def reduce_merged(self, step: Step, groups: Sequence[Group]) -> None:
        """Reduce images that are already in the prompt, each of them alone."""
        parts = [self._part_of(step, group) for group in groups]
        # Of images of several sizes, there are several parts.
        left = parts[0] if len(parts) == 1 else self._in_order(parts)
        if self.inside is not None:
            left = left._replace(kept=self.call(tokens.take, self.inside.kept, left.kept))
        several = len(parts) > 1 or self.inside is not None
        grid = self._cells_at(left.kept) if several else self._grid_of_prompt(left.kept)
        rule = rule_before_decoder(each.reduction for each in self.steps)
        self._shorten(groups[0].whole, left, grid, rule, step.reduction.mass_bias)

    def _part_of(self, step: Step, group: Group) -> Part:
        """Reduce the images of one size."""
        first, last, images = group.images[0], group.images[-1], len(group.images)
        count = step.counts[first]
        # Only the last image can end the prompt, and has to keep its last token then.
        last_of = self._last_of(images) if last == self.layout.images - 1 else 0
        reduced = self._operate(step, count, group, group.mass, last_of)
        # Of images [I, K, d], to be joined to those of prompts [B, I K, d].
        left, mass = self._written(step, reduced), reduced.mass
        if left is not None:
            left = self.call(tokens.of_prompts, left, images)
        if mass is not None:
            mass = self.call(tokens.masses_of_prompt, mass, images)
        self.cells = self._cells_of_kept(step, count, group.cells, reduced.kept)
        size = (self.inside.sizes if self.inside else self.layout.sizes)[first]
        kept = self.call(tokens.kept_of_prompt, reduced.kept, images, size)
        if group.columns is not None:
            # Back from indices into these images' tokens to those into all visual tokens.
            kept = self.call(tokens.take, group.columns[None], kept)
        return Part(kept, left, mass)

    def _in_order(self, parts: Sequence[Part]) -> Part:
        """Join what is left of the images of each size, in the order of the prompt."""
        # A prompt has tokens to write, or masses, only if the images of every size have: all use
        # the same reduction.
        joined: list[Any] = [
            None if any(value is None for value in same) else self.call(torch.cat, list(same), 1)
            for same in zip(*parts, strict=True)
        ]
        # The first is `kept`: places in the prompt.
        order = self.call(torch.argsort, joined[0], 1)
        ordered: list[Any] = [
            None if same is None else self.call(tokens.take, same, order) for same in joined
        ]
        return Part(*ordered)

    def enter_prompt(self, steps: Sequence[Step]) -> None:
        """Shorten the prompts' runs of placeholders to the tokens that are left of each image."""
        if self.inside is not None:
            # Case: an encoder that is one node, so that all features are in the prompt. Masses that
            # arise in the tower bias the attention of the tower only.
            hidden = self.nodes[self.sites.features]
            # After both the prompt and the visual tokens' positions.
            with self.graph.inserting_before(max(hidden, self.visual).next):
                left = Part(self.inside.kept, None, self.inside.mass)
                rule = rule_before_decoder(step.reduction for step in steps)
                self._shorten(hidden, left, self._cells_at(left.kept), rule, 0.0)
            return
        last, own, mass = steps[-1], self.kept, self.mass
        images, per_image = self.layout.images, self.layout.tokens_per_image
        # After everything that is read here: the encoder, and the embeddings of the prompt.
        embeddings = self.nodes[self.sites.embeddings]
        made = [node for node in (own, mass, embeddings) if node is not None]
        with self.graph.inserting_before(max(made).next):
            if all(step.reduction.order == "position" for step in steps):
                # Case: features in the order of the image. They take the placeholders of the tokens
                # that were kept.
                kept = self.call(tokens.kept_of_prompt, own, images, per_image)
                grid = self._grid_of_prompt(kept)
            else:
                # Case: another order. The features of an image take its first placeholders, or its
                # last ones if the placeholder at the end of the prompt has to stay. For its grid, a
                # -1 (a copy of the CLS token) is given the cell of the first patch.
                patches = self.call(torch.clamp, own, 0)
                patches = self.call(tokens.kept_of_prompt, patches, images, per_image)
                grid = self._grid_of_prompt(patches)
                ends = self.layout.ends
                slots = tokens.last_of_prompt if ends else tokens.first_of_prompt
                kept = self.call(slots, own, images, per_image)
            if mass is not None:
                mass = self.call(tokens.masses_of_prompt, mass, images)
            rule = rule_before_decoder(step.reduction for step in steps)
            # Masses that arise in the tower bias the attention of the tower only.
            beta = 0.0 if last.stage == "vision" else last.reduction.mass_bias
            self._shorten(embeddings, Part(kept, None, mass), grid, rule, beta)

    # *** in the decoder ***

    def reduce_prompt(self, step: Step, place: Place) -> None:
        """Reduce all visual tokens of a prompt together, after a decoder layer."""
        count = sum(step.counts)
        reduced = self._operate(step, count, place, self.mass, self._last_of(1))
        left = Part(reduced.kept, self._written(step, reduced), reduced.mass)
        grid = self._cells_of_kept(step, count, self.grid, reduced.kept)
        rules = step.reduction.position, step.reduction.mass_bias
        self._shorten(place.whole, left, grid, *rules)

    # *** both ***

    def _operate(
        self,
        step: Step,
        count: int,
        place: Place,
        mass: fx.Node | None,
        last_of: int,
    ) -> StaticOutput:
        """Emit the operator itself; nodes that nothing reads are dropped at the end."""
        # On one device, moving arguments would only make the graph longer.
        call = partial(self.emitter.call_beside, place.own) if self.several_devices else self.call
        given = (place.own, mass, place.features)
        reduced = static_reduce(step.reduction, count, *given, call, last_of)
        roles = ["kept", "mass", "score", "assignment"]
        if reduced.assignment is not None:
            roles += ["receivers", "sources", "weight"]
        for role in roles:
            self.emitter.explain(role, getattr(reduced, role))
        return reduced

    def _written(self, step: Step, reduced: StaticOutput) -> fx.Node | None:
        """Return the tokens that have to be written into the prompt.

        Tokens that are only gathered need not be: the prompt has them.
        """
        only_gathered = reduced.assignment is None and not step.reduction.reweight
        return None if only_gathered else reduced.tokens

    def _last_of(self, images: int) -> int:
        """Return `images` if prompts end in a visual token, else 0.

        In the first case, one of so many rows of the reduction is the last of its prompt, and the
        last token of that row must stay.
        """
        return images if self.layout.ends else 0

    def _shorten(
        self,
        hidden: fx.Node,
        left: Part,
        grid: fx.Node | torch.Tensor,
        position: str,
        beta: float,
    ) -> None:
        """Shorten the prompt to text and kept tokens, for everything after this point.

        Args:
            hidden: The prompt [B, N, d].
            left: What is left of it.
            grid: Image, row and column of every kept token.
            position: The rule for positions: ``keep``, ``compact`` or ``grid``.
            beta: How strongly masses bias later attention.
        """
        self.mass = left.mass
        bias = partial(self.prompt_bias, beta)
        self.space.shorten(
            hidden,
            left.kept,
            left.tokens,
            position=position,
            bias=bias,
            enter=self.enter_layer,
            until=self.until("decoder"),
            alive=self.alive,
        )
        self.visual, self.grid = self.space.visual, grid

    def enter_layer(self, layer: fx.Node) -> None:
        """Change a decoder layer in the space that has just been opened."""

    def _cells_of_kept(
        self, step: Step, count: int, cells: fx.Node | torch.Tensor, kept: fx.Node
    ) -> fx.Node | torch.Tensor:
        """Return image, row and column of every kept token.

        They are still a constant if the grid alone chose the tokens.

        Args:
            step: The reduction.
            count: K, the number of tokens that it keeps.
            cells: Image, row and column of the tokens before it.
            kept: Indices [B, K] of the kept tokens.
        """
        if isinstance(cells, fx.Node):
            # Case: scores have chosen tokens at an earlier site.
            return self.call(tokens.known_of_kept, cells, kept)
        # Case: the grid has been a constant so far.
        # None if this reduction chooses by scores.
        left = grid_after(step.reduction, count, cells)
        return self.call(tokens.known_of_kept, cells[None], kept) if left is None else left

    def _grid_of_prompt(self, kept: fx.Node) -> fx.Node | torch.Tensor:
        """Return image, row and column of the tokens that are left of all images of a prompt.

        Args:
            kept: Their indices [B, K] among the prompt's visual tokens.
        """
        if isinstance(self.cells, torch.Tensor):
            # Case: the grid alone has chosen, so the same places are left of each image.
            return grid_of_prompt(self.cells, self.layout.images)
        return self._cells_at(kept)

    def _cells_at(self, kept: fx.Node) -> fx.Node:
        """Return image, row and column at indices [B, K] into all visual tokens of a prompt."""
        whole = self.layout.grid_tensor(self.layout.images)[None]
        return self.call(tokens.known_of_kept, whole, kept)
