"""Insert relaxed reductions, which are differentiable and drop no token.

All values keep their lengths. At each site a module moves content between visual tokens and lowers
the gates of those that would be dropped; later attention gets the log-gates as a bias on its keys.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deos_fx import tokens
from deos_fx.forms.needs import feature_name
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.scores import SCORES
from deos_fx.passes.analyse.annotate_token_spaces import position_tables
from deos_fx.passes.analyse.check_reduction import check_reduction
from deos_fx.passes.analyse.sites import Sites
from deos_fx.passes.graph import blocks_after, blocks_of
from deos_fx.passes.lower.site_walk import Group, Place, SiteWalk, Step
from deos_fx.passes.notes import note_of
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.passes.observe.site_features import TowerFeatures
from deos_fx.policy.site import site_order
from deos_fx.tokens.layout import PromptLayout, rule_before_decoder

__all__ = ["insert_relaxed"]


class RelaxedSite(nn.Module):
    """A relaxed reduction with the features of its site in a fixed order.

    Args:
        reduction: The relaxed reduction.
        features: Names of the features that its scores and similarities need.
        last_of: Number of rows of a prompt that ends in a visual token, which has to stay; 0 if
            prompts end in text.
    """

    def __init__(
        self, reduction: RelaxedReduction, features: tuple[str, ...], last_of: int
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.features = features
        self.last_of = last_of

    def forward(
        self, visual: Tensor, alive: Tensor, mass: Tensor, beta: Tensor, *features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply the reduction.

        Args:
            visual: Visual tokens [B, V, d].
            alive: Gates so far [B, V].
            mass: Masses [B, V].
            beta: 0-dim, mass bias so far.
            *features: In the order of ``self.features``.

        Returns:
            Tokens [B, V, d], gates [B, V], masses [B, V] and the mass bias.
        """
        named = dict(zip(self.features, features, strict=True))
        result = self.reduction(visual, alive, mass, named, self.last_of)
        return result.tokens, result.alive, result.mass, self.reduction.bias_after(beta)


def insert_relaxed(
    graph_module: fx.GraphModule,
    sites: Sites,
    reductions: Mapping[str, RelaxedReduction],
    layout: PromptLayout,
) -> fx.GraphModule:
    """Put one relaxed reduction at every given site.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        reductions: Site name -> relaxed reduction; its parameters stay those of the given module.
        layout: The prompts this graph is for.

    Returns:
        The same graph module. Its output gains ``gates``: one [B, V] for each site, in order of
        depth.

    Raises:
        ValueError: If a site cannot be used or lacks a score, or a layer takes no bias.
    """
    steps = []
    for name in sorted(reductions, key=site_order):
        # The checks know static reductions. What a relaxed one needs does not change while it is
        # trained, so its start stands for it.
        start = replace(reductions[name].start, site=name)
        site = check_reduction(graph_module, sites, start, layout)
        steps.append(Step(start, site, _needs(reductions[name])))
    _check_layers(graph_module)
    return _Insertion(graph_module, sites, layout, steps, reductions).walk()


def _check_layers(graph_module: fx.GraphModule) -> None:
    """Refuse layers that ignore gates: only attention takes a bias.

    Raises:
        ValueError: If a decoder layer takes a mask of padding alone.
    """
    for node in graph_module.graph.nodes:
        mask = node.kwargs.get("attention_mask")
        if isinstance(mask, fx.Node) and note_of(mask).padding:
            raise ValueError(
                f"{node.name} is a convolution, which sees a token that is half gone as it sees "
                "any other: reductions of this model cannot be searched by gradient. Give a policy."
            )


class _Insertion(SiteWalk):
    """Emits modules; gates and masses flow from one to the next.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        layout: The prompts.
        steps: The starts of the reductions.
        reductions: Site name -> relaxed reduction.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        sites: Sites,
        layout: PromptLayout,
        steps: Sequence[Step],
        reductions: Mapping[str, RelaxedReduction],
    ) -> None:
        super().__init__(graph_module, sites, layout, steps)
        self.reductions = reductions
        ids = self.nodes["position_ids"]
        # Position ids and rotary tables: original node -> node at this point.
        self.positions = {node: node for node in [ids, *position_tables(graph_module)]}
        # Masses [I, V] before the decoder and [B, V] in it, like the gates; None while all are 1.
        self.mass: fx.Node | None = None
        # 0-dim, how strongly masses bias attention; None for 0.
        self.beta: fx.Node | None = None
        self.gates: list[fx.Node] = []

    def outputs(self) -> dict[str, Any]:
        """Return the gates of every site."""
        return {"gates": self.gates}

    # *** before the decoder ***

    def reduce_images(self, step: Step, place: Place) -> None:
        """Reduce every image alone: its patches in the tower, or its features after it."""
        in_tower = step.stage == "vision"
        if not in_tower:
            # Masses bias attention only in the stage in which they arise.
            self.beta = None
        place.put_back(self._reduce(step, place))
        # Gates of images [I, V] are reported as gates of prompts [B, V], like those in the decoder.
        self.gates.append(self.call(tokens.masses_of_prompt, self.alive, self.layout.images))
        if in_tower:
            # Gates bias the later blocks of the tower; class tokens have no gate.
            given = (self.alive, self.mass, self.beta, self.sites.class_tokens)
            bias = self.call(tokens.patch_gate_bias, *given)
            for block in blocks_after(bias, "vision"):
                bias_block(self.graph_module, block, bias)

    def reread(self, features: TowerFeatures, name: str) -> fx.Node:
        """Read a feature of the latest site in the tower, which has kept every token in place."""
        return features[name]

    def reduce_merged(self, step: Step, groups: Sequence[Group]) -> None:
        """Reduce images that are already in the prompt, each of them alone."""
        # In a search, all images of a batch have one size, so there is one group.
        (group,) = groups
        reduced = self._reduce(step, group)
        self._join_images()
        self._write(step, group, self.call(tokens.of_prompts, reduced, self.layout.images))

    def enter_prompt(self, steps: Sequence[Step]) -> None:
        """Turn gates and masses of each image into those of a prompt, for all decoder layers."""
        first = blocks_of(self.graph, "decoder")[0]
        embeddings: Any = first.args[0]
        with self.graph.inserting_before(first):
            self._join_images()
            if steps[-1].stage == "vision":
                # Masses that arise in the tower bias the attention of the tower only.
                self.beta = self.emitter.constant(torch.zeros(()))
            self._bias_decoder(rule_before_decoder(step.reduction for step in steps), embeddings)

    def _join_images(self) -> None:
        """Turn gates and masses [I, V] of images into those [B, V] of prompts."""
        images = self.layout.images
        self.alive = self.call(tokens.masses_of_prompt, self.alive, images)
        self.mass = self.call(tokens.masses_of_prompt, self.mass, images)

    # *** in the decoder ***

    def reduce_prompt(self, step: Step, place: Place) -> None:
        """Reduce all visual tokens of a prompt together, after a decoder layer."""
        self._write(step, place, self._reduce(step, place))

    def _write(self, step: Step, place: Place, reduced: fx.Node) -> None:
        """Write reduced tokens into the prompt, and bias the attention to them."""
        # Every visual token is written back into its own place.
        prompt = place.put_back(self.call(tokens.put, place.whole, self.visual, reduced))
        assert self.alive is not None
        self.gates.append(self.alive)
        self._bias_decoder(step.reduction.position, prompt)

    def _bias_decoder(self, position: str, hidden: fx.Node) -> None:
        """Bias the attention of all later layers, and move their positions.

        Args:
            position: The rule for positions: ``keep``, ``compact`` or ``grid``.
            hidden: The prompt [B, N, d]; only its shape is read.
        """
        given = (self.alive, self.mass, self.beta, self.visual, hidden)
        bias = self.call(tokens.gate_bias, *given)
        layers = blocks_after(bias, "decoder")
        for layer in layers:
            bias_block(self.graph_module, layer, bias)
        if position != "keep":
            self._move(position, layers, hidden)

    def _move(self, position: str, layers: Sequence[fx.Node], hidden: fx.Node) -> None:
        """Give later layers new position ids, and rotary tables that are made from them."""
        # Positions are always moved from the original ones: gates say how much of each token is
        # left in all.
        ids, *tables = self.positions
        given = (ids, self.alive, self.visual)
        if position == "compact":
            moved = self.call(tokens.relaxed_positions, *given, hidden)
        else:
            moved = self.call(tokens.relaxed_grid_positions, *given, self.layout.images)
        replaced = {self.positions[ids]: moved}
        # Tables are copied, so that earlier layers keep theirs.
        for table in tables:
            replaced[self.positions[table]] = self.graph.node_copy(
                table, lambda node: moved if node is ids else node
            )
        for layer in layers:
            layer.args, layer.kwargs = fx.node.map_arg(
                (layer.args, layer.kwargs), lambda node: replaced.get(node, node)
            )
        # What later layers read now, for the next site to replace.
        for node, here in self.positions.items():
            self.positions[node] = replaced.get(here, here)

    # *** both ***

    def _reduce(self, step: Step, place: Place) -> fx.Node:
        """Insert the reduction's module, update gates, masses and mass bias, and return the tokens.

        Args:
            step: The reduction.
            place: The tokens.
        """
        names = tuple(sorted(step.needs))
        target = f"reduce_{self.emitter.suffix}"
        # In the decoder, a row is a prompt; before it, an image.
        rows = 1 if step.stage == "decoder" else self.layout.images
        reduction = self.reductions[step.site.name]
        site = RelaxedSite(reduction, names, rows if self.layout.ends else 0)
        self.graph_module.add_submodule(target, site)
        if self.alive is None:
            # Case: the first site.
            self.alive = self.mass = self.call(tokens.ones_like_tokens, place.own)
        beta = self.emitter.constant(torch.zeros(())) if self.beta is None else self.beta
        # Looking a feature up emits its nodes. The grid is a constant, and becomes a buffer.
        read = [place.features[name] for name in names]
        read = pytree.tree_map_only(torch.Tensor, self.emitter.constant, read)
        node = self.graph.call_module(target, (place.own, self.alive, self.mass, beta, *read))
        # The module returns a tuple: tokens, gates, masses and mass bias.
        reduced, *rest = (self.call(operator.getitem, node, i) for i in range(4))
        self.alive, self.mass, self.beta = rest
        return reduced


def _needs(reduction: RelaxedReduction) -> frozenset[str]:
    """Return the names of the features that a reduction reads, apart from the tokens themselves.

    A relaxed reduction mixes all scores and similarities, so it needs more than its start would.
    """
    start = reduction.start
    names = {feature for score in start.scores for feature in SCORES[score].features}
    names |= {SIMILARITIES[kind] for kind in start.similarity}
    if start.selector == "grid":
        names.add("grid")
    return frozenset(feature_name(name, start.observe) for name in names - {"tokens"})
