"""Insert relaxed reductions: differentiable, and no token really leaves.

The graph keeps its shape. At each site a module moves content between visual tokens and lowers the
gates of those that would be dropped; later attention gets the log-gates as a bias on its keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from deos_fx import tokens
from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.relaxed import RelaxedReduction
from deos_fx.operator.scores import SCORES
from deos_fx.operator.static import feature_name
from deos_fx.passes.annotate_token_spaces import position_tables
from deos_fx.passes.features import PromptFeatures, PromptText, SiteFeatures, TowerFeatures
from deos_fx.passes.find_sites import Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.observe_block import bias_block
from deos_fx.reduction import site_order

__all__ = ["RelaxedSite", "insert_relaxed"]


class RelaxedSite(nn.Module):
    """A relaxed reduction with the features of its site in a fixed order.

    Args:
        reduction: The relaxed reduction.
        features: Names of the features that its scores and similarities need.
    """

    def __init__(self, reduction: RelaxedReduction, features: tuple[str, ...]) -> None:
        super().__init__()
        self.reduction = reduction
        self.features = features

    def forward(
        self, visual: Tensor, alive: Tensor, mass: Tensor, beta: Tensor, *features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply it.

        Args:
            visual: Visual tokens [B, V, d].
            alive: Gates so far [B, V].
            mass: [B, V].
            beta: 0-dim, mass bias so far.
            *features: In the order of ``self.features``.

        Returns:
            Tokens [B, V, d], gates [B, V], masses [B, V] and the mass bias.
        """
        named = dict(zip(self.features, features, strict=True))
        result = self.reduction(visual, alive, mass, named)
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
        ValueError: If a site cannot be used or lacks a score.
    """
    insertion = _Insertion(graph_module, sites, layout)
    for name in sorted(reductions, key=site_order):
        site = sites.usable(name, reductions[name].start.scores)
        if name == "projector":
            insertion.at_projector(reductions[name])
        else:
            insertion.in_decoder(name, reductions[name], insertion.nodes[site.node])
    insertion.add_output()
    return finish(graph_module)


class _Insertion:
    """Walks the sites in order of depth; gates and masses flow from one to the next."""

    def __init__(self, graph_module: fx.GraphModule, sites: Sites, layout: PromptLayout) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.sites = sites
        self.layout = layout
        self.nodes = {node.name: node for node in self.graph.nodes}
        ids = self.nodes["position_ids"]
        self.positions = {node: node for node in [ids, *position_tables(graph_module)]}
        count = layout.images * layout.tokens_per_image
        input_ids = self.nodes["input_ids"]
        with self.graph.inserting_after(input_ids):
            self.visual = self.call(tokens.visual_positions, input_ids, layout.image_token, count)
        with self.graph.inserting_after(self.visual):
            self.alive = self.call(tokens.ones_at, self.visual)
        self.mass = self.alive
        with self.graph.inserting_after(self.alive):
            self.beta = self.call(torch.zeros, ())
        self.gates: list[fx.Node] = []
        self.done: list[str] = []
        self.text: PromptText | None = None

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def at_projector(self, reduction: RelaxedReduction) -> None:
        features = self.nodes[self.sites.features]
        images = self.layout.images
        needs = _needs(reduction)
        known = TowerFeatures(
            self.graph_module,
            "projector",
            self.nodes[self.sites.tower_block],
            needs,
            self.call,
            class_tokens=self.sites.class_tokens,
            text=self._text(self.nodes[self.sites.embeddings]),
            images=images,
            makers={"grid": lambda: self._grid("projector", 1)},
        )
        users = list(features.users)
        with self.graph.inserting_before(features.next):
            alive = self.call(tokens.ones_like_tokens, features)
            parts = self._site(reduction, "projector", features, alive, alive, known, needs)
            reduced, alive, mass, self.beta = parts
            self.alive = self.call(tokens.masses_of_prompt, alive, images)
            self.mass = self.call(tokens.masses_of_prompt, mass, images)
            for user in users:
                user.replace_input_with(features, reduced)
        self._behind(reduction, self.nodes["decoder_0"].prev, self.nodes["decoder_0"].args[0])

    def in_decoder(self, name: str, reduction: RelaxedReduction, block: fx.Node) -> None:
        needs = _needs(reduction)
        if self.text is None:
            first = self.nodes["decoder_0"]
            self.text = self._text(first.args[0], self.alive, first)
        known = PromptFeatures(
            self.graph_module,
            name,
            block,
            needs,
            self.call,
            visual=self.visual,
            padding=lambda: self.nodes.get("attention_mask"),
            text=self.text,
            alive=self.alive,
            reduced=self.done,
            makers={"grid": lambda: self._grid(name, self.layout.images)},
        )
        hidden = known.hidden
        users = list(hidden.users)
        with self.graph.inserting_before(known.anchor):
            visual = self.call(tokens.take, hidden, self.visual)
            parts = self._site(reduction, name, visual, self.alive, self.mass, known, needs)
            reduced, self.alive, self.mass, self.beta = parts
            behind = self.call(tokens.put, hidden, self.visual, reduced)
        for user in users:
            user.replace_input_with(hidden, behind)
        self._behind(reduction, behind, behind)

    def _text(
        self, embeddings: Any, alive: fx.Node | None = None, before: fx.Node | None = None
    ) -> PromptText:
        mask = self.nodes.get("attention_mask")
        return PromptText(self.call, embeddings, self.visual, mask, alive, before)

    def _site(
        self,
        reduction: RelaxedReduction,
        name: str,
        visual: fx.Node,
        alive: fx.Node,
        mass: fx.Node,
        known: SiteFeatures,
        needs: tuple[str, ...],
    ) -> list[fx.Node]:
        self.done.append(name)
        features = [known[need] for need in needs]
        target = f"reduce_{name.replace('.', '_')}"
        self.graph_module.add_submodule(target, RelaxedSite(reduction, needs))
        node = self.graph.call_module(target, (visual, alive, mass, self.beta, *features))
        return [self.call(operator.getitem, node, i) for i in range(4)]

    def _behind(self, reduction: RelaxedReduction, after: fx.Node, hidden: fx.Node) -> None:
        """Bias the attention, and under ``compact`` move the positions, of all later layers."""
        self.gates.append(self.alive)
        with self.graph.inserting_before(after.next):
            bias = self.call(
                tokens.gate_bias, self.alive, self.mass, self.beta, self.visual, hidden
            )
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        layers = [
            node
            for name, node in self.nodes.items()
            if name.startswith("decoder_") and order[node] > order[bias]
        ]
        for layer in layers:
            bias_block(self.graph_module, layer, bias)
        if reduction.start.position == "compact":
            self._compact(bias, layers, hidden)

    def _compact(self, before: fx.Node, layers: list[fx.Node], hidden: fx.Node) -> None:
        ids, *tables = self.positions
        with self.graph.inserting_after(before):
            compact = self.call(tokens.relaxed_positions, ids, self.alive, self.visual, hidden)
        replaced = {self.positions[ids]: compact}
        for table in tables:
            with self.graph.inserting_after(compact):
                again = self.graph.node_copy(table, lambda node: compact if node is ids else node)
            replaced[self.positions[table]] = again
        for layer in layers:
            layer.args, layer.kwargs = fx.node.map_arg(
                (layer.args, layer.kwargs), lambda node: replaced.get(node, node)
            )
        for node, here in self.positions.items():
            self.positions[node] = replaced.get(here, here)

    def _grid(self, name: str, images: int) -> fx.Node:
        target = f"grid_{name.replace('.', '_')}"
        device = next(self.graph_module.parameters()).device
        grid = self.layout.grid_tensor(images).to(device)
        self.graph_module.register_buffer(target, grid, persistent=False)
        return self.graph.get_attr(target)

    def add_output(self) -> None:
        output = self.graph.output_node()
        fields: Any = output.args[0]
        output.args = ({**fields, "gates": self.gates},)


def _needs(reduction: RelaxedReduction) -> tuple[str, ...]:
    """Features of a site, beside the tokens themselves, that a reduction reads."""
    start = reduction.start
    names = {need for name in start.scores for need in SCORES[name].features}
    names |= {SIMILARITIES[kind] for kind in start.similarity}
    names |= {"grid"} if start.selector == "grid" else set()
    return tuple(sorted(feature_name(name, start.observe) for name in names - {"tokens"}))
