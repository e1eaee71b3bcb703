"""Insert relaxed reductions, which are differentiable and let no token really leave.

The graph keeps its shape. At each site a module moves content between visual tokens and lowers the
gates of those that would be dropped; later attention gets the log-gates as a bias on its keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from deos_fx import tokens
from deos_fx.attention.observation import OBSERVED
from deos_fx.forms.needs import feature_name
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.scores import SCORES
from deos_fx.passes.analyse.annotate_token_spaces import padding_node, position_tables
from deos_fx.passes.analyse.check_reduction import check_reduction
from deos_fx.passes.analyse.find_sites import Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import blocks_behind, users_behind
from deos_fx.passes.lower.insert_visual_positions import insert_visual_positions
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.passes.observe.prompt_features import PromptFeatures
from deos_fx.passes.observe.prompt_text import PromptText
from deos_fx.passes.observe.tower_features import TowerFeatures
from deos_fx.policy.site import site_order, split_site
from deos_fx.tokens.layout import PromptLayout, rule_before_decoder

__all__ = ["RelaxedSite", "insert_relaxed"]


class RelaxedSite(nn.Module):
    """A relaxed reduction with the features of its site in a fixed order.

    Args:
        reduction: The relaxed reduction.
        features: Names of the features that its scores and similarities need.
        last_of: Number of rows of which the last one ends its prompt with a visual token, which
            stays; 0 if prompts end in text.
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
    ordered = sorted(reductions, key=site_order)
    for name in ordered:
        check_reduction(graph_module, sites, replace(reductions[name].start, site=name), layout)
    _check_layers(graph_module)
    insertion = _Insertion(graph_module, sites, layout, reductions)
    # Before the decoder, each image is reduced alone.
    of_images = [name for name in ordered if split_site(name)[0] != "decoder"]
    for name in of_images:
        if sites.merged:
            insertion.at_merged(name)
        else:
            insertion.at_images(name)
    if of_images and not sites.merged:
        insertion.enter_prompt(of_images)
    # In the decoder, all visual tokens of a prompt are reduced together.
    for name in ordered[len(of_images) :]:
        insertion.in_decoder(name)
    insertion.add_output()
    return finish(graph_module)


def _check_layers(graph_module: fx.GraphModule) -> None:
    """Refuse layers that ignore gates: only attention takes a bias.

    Raises:
        ValueError: If a decoder layer takes a mask of padding alone.
    """
    for node in graph_module.graph.nodes:
        mask = node.kwargs.get("attention_mask")
        if isinstance(mask, fx.Node) and mask.meta.get("padding"):
            raise ValueError(
                f"{node.name} is a convolution, which sees a token that is half gone as it sees "
                "any other: reductions of this model cannot be searched by gradient. Give a policy."
            )


class _Insertion:
    """Walks the sites in order of depth; gates and masses flow from one to the next.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        layout: The prompts.
        reductions: Site name -> relaxed reduction.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        sites: Sites,
        layout: PromptLayout,
        reductions: Mapping[str, RelaxedReduction],
    ) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.sites = sites
        self.layout = layout
        self.reductions = reductions
        self.nodes = {node.name: node for node in self.graph.nodes}
        ids = self.nodes["position_ids"]
        self.positions = {node: node for node in [ids, *position_tables(graph_module)]}
        self.visual = insert_visual_positions(graph_module, sites, layout, self.call)
        # Gates and masses, all 1 at first: per image before the decoder, per prompt in it.
        with self.graph.inserting_after(self.visual):
            self.alive = self.call(tokens.ones_at, self.visual)
        self.mass = self.alive
        # The mass bias before the first site.
        with self.graph.inserting_after(self.alive):
            self.zero = self.call(torch.zeros, ())
        self.beta = self.zero
        self.gates: list[fx.Node] = []
        self.done: list[str] = []
        self.tower: TowerFeatures | None = None
        mask = padding_node(self.graph_module)
        self.text = PromptText(self.call, self.nodes[sites.embeddings], self.visual, mask)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Emit a call_function node."""
        return self.graph.call_function(function, args)

    # *** before the decoder ***

    def at_merged(self, name: str) -> None:
        """Reduce every image alone where its features are already in the prompt."""
        hidden, images = self.nodes[self.sites.features], self.layout.images
        features = self._tower_features(name)
        # After both the prompt and the initial gates.
        anchor = max(hidden, self.zero, key=self._order().__getitem__).next
        users = users_behind(hidden, anchor)
        with self.graph.inserting_before(anchor):
            visual = self.call(tokens.take, hidden, self.visual)
            own = self.call(tokens.of_images, visual, images)
            self.alive = self.mass = self.call(tokens.ones_like_tokens, own)
            reduced = self.call(tokens.of_prompts, self._site(name, own, features), images)
            self.alive = self.call(tokens.masses_of_prompt, self.alive, images)
            self.mass = self.call(tokens.masses_of_prompt, self.mass, images)
            behind = self.call(tokens.put, hidden, self.visual, reduced)
        for user in users:
            user.replace_input_with(hidden, behind)
        self.gates.append(self.alive)
        self._behind(self.reductions[name].start.position, behind, behind)

    def _order(self) -> dict[fx.Node, int]:
        """Return the place of every node in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def at_images(self, name: str) -> None:
        """Reduce every image alone: its patches in the tower, or its features after it."""
        in_tower = name != "projector"
        features = self._tower_features(name)
        whole, anchor = features.hidden, features.anchor
        class_tokens = self.sites.class_tokens
        if not in_tower:
            # At the projector, a block of the tower is observed, but its features are reduced.
            whole = self.nodes[self.sites.features]
            anchor, class_tokens = whole.next, 0
            # Masses bias attention only in the stage in which they arise.
            self.beta = self.zero
        users = users_behind(whole, anchor)
        with self.graph.inserting_before(anchor):
            own = whole
            if class_tokens:
                own = self.call(tokens.without_class, whole, class_tokens)
            if self.tower is None:
                # The first site: from here on, gates and masses are those of each image.
                self.alive = self.mass = self.call(tokens.ones_like_tokens, own)
            reduced = self._site(name, own, features)
            if class_tokens:
                reduced = self.call(tokens.with_patches, whole, reduced, class_tokens)
            for user in users:
                user.replace_input_with(whole, reduced)
            self.gates.append(self.call(tokens.masses_of_prompt, self.alive, self.layout.images))
            if in_tower:
                # Gates bias the later blocks of the tower; class tokens have no gate.
                given = (self.alive, self.mass, self.beta, self.sites.class_tokens)
                bias = self.call(tokens.patch_gate_bias, *given)
                for block in blocks_behind(bias, "vision"):
                    bias_block(self.graph_module, block, bias)
        self.tower = features

    def enter_prompt(self, of_images: Sequence[str]) -> None:
        """Turn gates and masses of each image into those of a prompt, for all decoder layers.

        Args:
            of_images: Names of the sites before the decoder.
        """
        first = self.nodes["decoder_0"]
        images = self.layout.images
        with self.graph.inserting_before(first):
            self.alive = self.call(tokens.masses_of_prompt, self.alive, images)
            self.mass = self.call(tokens.masses_of_prompt, self.mass, images)
        self.beta = self.beta if of_images[-1] == "projector" else self.zero
        rule = rule_before_decoder(self.reductions[name].start for name in of_images)
        embeddings: Any = first.args[0]
        self._behind(rule, self.mass, embeddings)

    def _tower_features(self, name: str) -> TowerFeatures:
        """Make the features of a reduction of images; each block is observed only once."""
        in_tower = name != "projector"
        block = self.nodes[name.replace(".", "_") if in_tower else self.sites.tower_block]
        needs = _needs(self.reductions[name])
        makers: dict[str, Callable[[], Any]] = {"grid": lambda: self._grid(name, 1)}
        tower = self.tower
        if not in_tower and tower is not None and tower.block is block:
            # Case: the last block of the tower was observed at its own site.
            shared = needs & OBSERVED.keys()
            makers |= {feature: partial(tower.__getitem__, feature) for feature in shared}
        elif block.name == self.sites.tower_block and "projector" in self.reductions:
            # Case: the last block, where the projector will ask for features as well.
            needs |= _needs(self.reductions["projector"]) & OBSERVED.keys()
        return TowerFeatures(
            self.graph_module,
            name,
            block,
            needs - makers.keys(),
            self.call,
            class_tokens=self.sites.class_tokens,
            alive=None if tower is None else self.alive,
            text=self.text,
            images=self.layout.images,
            reduced=self.done,
            makers=makers,
        )

    # *** in the decoder ***

    def in_decoder(self, name: str) -> None:
        """Reduce all visual tokens of a prompt together, after a decoder layer."""
        mask = padding_node(self.graph_module)
        first = self.nodes["decoder_0"]
        if self.text.before is None:
            # The first site in the decoder: read the text as it enters the first layer.
            embeddings: Any = first.args[0]
            self.text = PromptText(
                self.call, embeddings, self.visual, mask, self.alive, before=first
            )
        features = PromptFeatures(
            self.graph_module,
            name,
            self.nodes[name.replace(".", "_")],
            _needs(self.reductions[name]),
            self.call,
            visual=self.visual,
            padding=lambda: mask,
            text=self.text,
            alive=self.alive,
            reduced=self.done,
            makers={"grid": lambda: self._grid(name, self.layout.images)},
        )
        hidden = features.hidden
        users = users_behind(hidden, features.anchor)
        with self.graph.inserting_before(features.anchor):
            visual = self.call(tokens.take, hidden, self.visual)
            reduced = self._site(name, visual, features)
            behind = self.call(tokens.put, hidden, self.visual, reduced)
        for user in users:
            user.replace_input_with(hidden, behind)
        self.gates.append(self.alive)
        self._behind(self.reductions[name].start.position, behind, behind)

    # *** both ***

    def _site(self, name: str, visual: fx.Node, features: Mapping[str, fx.Node]) -> fx.Node:
        """Insert the reduction's module, update gates, masses and mass bias, and return the tokens.

        Args:
            name: Name of the site.
            visual: The visual tokens there.
            features: Features of the site.
        """
        reduction = self.reductions[name]
        names = tuple(sorted(_needs(reduction)))
        target = f"reduce_{name.replace('.', '_')}"
        in_decoder = split_site(name)[0] == "decoder"
        rows = 1 if in_decoder else self.layout.images
        site = RelaxedSite(reduction, names, rows if self.layout.ends else 0)
        self.graph_module.add_submodule(target, site)
        given = (visual, self.alive, self.mass, self.beta)
        node = self.graph.call_module(target, (*given, *(features[need] for need in names)))
        reduced, *rest = (self.call(operator.getitem, node, i) for i in range(4))
        self.alive, self.mass, self.beta = rest
        self.done.append(name)
        return reduced

    def _behind(self, position: str, after: fx.Node, hidden: fx.Node) -> None:
        """Bias the attention of all later layers, and move their positions.

        Args:
            position: The rule for positions: ``keep``, ``compact`` or ``grid``.
            after: The node to insert after.
            hidden: The prompt [B, N, d]; only its shape is read.
        """
        with self.graph.inserting_before(after.next):
            bias = self.call(
                tokens.gate_bias, self.alive, self.mass, self.beta, self.visual, hidden
            )
        layers = blocks_behind(bias, "decoder")
        for layer in layers:
            bias_block(self.graph_module, layer, bias)
        if position != "keep":
            self._move(position, bias, layers, hidden)

    def _move(self, position: str, before: fx.Node, layers: list[fx.Node], hidden: fx.Node) -> None:
        """Give later layers new position ids, and rotary tables that are made from them."""
        ids, *tables = self.positions
        given = (ids, self.alive, self.visual)
        with self.graph.inserting_after(before):
            if position == "compact":
                moved = self.call(tokens.relaxed_positions, *given, hidden)
            else:
                moved = self.call(tokens.relaxed_grid_positions, *given, self.layout.images)
        replaced = {self.positions[ids]: moved}
        # Tables are copied, so that earlier layers keep theirs.
        for table in tables:
            with self.graph.inserting_after(moved):
                again = self.graph.node_copy(table, lambda node: moved if node is ids else node)
            replaced[self.positions[table]] = again
        for layer in layers:
            layer.args, layer.kwargs = fx.node.map_arg(
                (layer.args, layer.kwargs), lambda node: replaced.get(node, node)
            )
        for node, here in self.positions.items():
            self.positions[node] = replaced.get(here, here)

    def _grid(self, name: str, images: int) -> fx.Node:
        """Store image, row and column of the tokens of some images as a buffer."""
        target = f"grid_{name.replace('.', '_')}"
        device = next(self.graph_module.parameters()).device
        grid = self.layout.grid_tensor(images).to(device)
        self.graph_module.register_buffer(target, grid, persistent=False)
        return self.graph.get_attr(target)

    def add_output(self) -> None:
        """Let the graph return the gates of every site."""
        output = self.graph.output_node()
        fields: Any = output.args[0]
        output.args = ({**fields, "gates": self.gates},)


def _needs(reduction: RelaxedReduction) -> set[str]:
    """Return the names of the features that a reduction reads besides the tokens themselves."""
    start = reduction.start
    names = {feature for score in start.scores for feature in SCORES[score].features}
    names |= {SIMILARITIES[kind] for kind in start.similarity}
    if start.selector == "grid":
        names.add("grid")
    return {feature_name(name, start.observe) for name in names - {"tokens"}}
