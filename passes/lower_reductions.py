"""Lower a policy to static ops: TopK, Gather and MatMul with constant counts.

Each reduction becomes a few named nodes (score, top_k, nearest, merge, ...). What a policy does
not use leaves no node: a pruning policy's graph has no assignment and no matmul, an unused score
is never observed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx import tokens
from deos_fx.operator import StaticOutput, required_features, select, static_reduce
from deos_fx.passes.annotate_token_spaces import position_tables
from deos_fx.passes.find_sites import Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.observe_block import (
    Observations,
    bias_block,
    observe_block,
    observe_class_token,
)
from deos_fx.passes.open_space import open_space
from deos_fx.policy import Policy, Reduction

__all__ = ["lower_reductions"]


def lower_reductions(
    graph_module: fx.GraphModule, sites: Sites, policy: Policy, layout: PromptLayout
) -> fx.GraphModule:
    """Insert every reduction of the policy as static ops.

    Args:
        graph_module: A captured, annotated prefill graph. Changed in place.
        sites: Its sites.
        policy: What to do where; the empty policy leaves the graph as it is.
        layout: The prompts this graph is for.

    Returns:
        The same graph module. Its output gains ``spaces``: one dict for each reduction with
        ``origin`` [B, M] (original prompt positions of what is left) and, if later attention is
        biased by mass, ``key_bias`` [B, M].

    Raises:
        ValueError: If a site does not exist, cannot be used or lacks a score the policy needs.
    """
    if not policy.is_empty:
        lowering = _Lowering(graph_module, sites, layout)
        counts = policy.counts(layout.tokens_per_image)
        for reduction, count in zip(policy.reductions, counts, strict=True):
            site = sites.usable(reduction.site, reduction.scores)
            step = _Step(reduction, count, reduction.site.replace(".", "_"))
            if site.name == "projector":
                lowering.reduce_images(step)
            else:
                lowering.reduce_prompt(step, lowering.nodes[site.node])
        lowering.add_output()
    return finish(graph_module)


@dataclass(frozen=True)
class _Step:
    """One reduction to lower: how many tokens (per image) and the suffix of its nodes' names."""

    reduction: Reduction
    count: int
    suffix: str


class _Features(dict[str, Any]):
    """Features of the visual tokens at a site; one becomes a node when it is looked up."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        super().__init__()
        self.makers = makers

    def __missing__(self, name: str) -> Any:
        self[name] = self.makers[name]()
        return self[name]


@dataclass
class _Space:
    """The token space that the graph is in, from front to back."""

    visual: fx.Node
    grid: fx.Node | torch.Tensor
    origin: fx.Node | None = None
    mass: fx.Node | None = None


class _Lowering:
    """Inserts reductions in order of depth and keeps track of the token space."""

    def __init__(self, graph_module: fx.GraphModule, sites: Sites, layout: PromptLayout) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.sites = sites
        self.layout = layout
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.suffix = ""
        self.spaces: list[dict[str, fx.Node]] = []
        # Position ids and rotary tables: original node -> its counterpart in the current space.
        sources = [self.nodes["position_ids"], *position_tables(graph_module)]
        self.positions = {node: node for node in sources}
        # The position ids of every space so far: a rotary table may read those of any.
        self.position_ids = {sources[0]}
        input_ids = self.nodes["input_ids"]
        count = layout.images * layout.tokens_per_image
        with self.graph.inserting_after(input_ids):
            visual = self.call(tokens.visual_positions, input_ids, layout.image_token, count)
        self.space = _Space(visual, layout.grid_tensor(layout.images))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """A call_function node named after its function and the site.

        What depends on nothing but constants (anchors on the grid) is computed at once.
        """
        leaves = pytree.tree_leaves(args)
        if not any(isinstance(leaf, fx.Node) for leaf in leaves):
            return function(*args)
        args = pytree.tree_map_only(torch.Tensor, self._constant, args)
        name = f"{function.__name__}_{self.suffix}" if self.suffix else function.__name__
        return self.graph.create_node("call_function", function, args, {}, name)

    def note(self, role: str, node: Any) -> Any:
        """Mark a node, or a constant, for `ReducedModel.explain`."""
        if isinstance(node, fx.Node):
            node.meta["explains"] = (self.suffix, role)
        elif node is not None:
            self.graph_module.meta.setdefault("explains", {})[self.suffix, role] = node
        return node

    # *** the two kinds of site ***

    def reduce_images(self, step: _Step) -> None:
        """Reduce every image's features alone, then shorten the prompts' runs of placeholders."""
        self.suffix = step.suffix
        features = self.nodes[self.sites.features]
        per_image = self.layout.tokens_per_image
        makers: dict[str, Callable[[], Any]] = {"grid": lambda: self.layout.grid_tensor(1)}
        if "attention_cls" in required_features(step.reduction):
            block = self.nodes[self.sites.tower_block]
            attention = observe_class_token(
                self.graph_module, block, self.sites.class_tokens, self.call
            )
            makers["attention_cls"] = lambda: attention
        users = list(features.users)
        with self.graph.inserting_before(features.next):
            reduced = self._operate(step, step.count, features, None, makers)
            for user in users:
                user.replace_input_with(features, reduced.tokens)
            images = self.layout.images
            kept = self.call(tokens.kept_of_prompt, reduced.kept, images, per_image)
            mass = reduced.mass
            if mass is not None:
                mass = self.note("mass", self.call(tokens.masses_of_prompt, mass, images))
        embeddings = self.nodes[self.sites.embeddings]
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        last = max((mass or kept, embeddings), key=order.__getitem__)
        with self.graph.inserting_before(last.next):
            self._enter_space(step, embeddings, self.note("kept", kept), None, mass)

    def reduce_prompt(self, step: _Step, block: fx.Node) -> None:
        """Reduce all visual tokens of a prompt together, behind a decoder layer."""
        self.suffix = step.suffix
        space = self.space
        seen, hidden, anchor = self._observe(block, required_features(step.reduction))
        makers: dict[str, Callable[[], Any]] = {
            "keys": lambda: self.call(tokens.take, seen.key, space.visual),
            "grid": lambda: space.grid,
            "attention_last": lambda: self.call(tokens.attention_to, seen.last, space.visual),
            "attention_text": lambda: self.call(
                tokens.text_attention_to, seen.rows, seen.text, space.visual, self._padding()
            ),
        }
        with self.graph.inserting_before(anchor):
            visual = self.call(tokens.take, hidden, space.visual)
            count = step.count * self.layout.images
            reduced = self._operate(step, count, visual, space.mass, makers)
            self.note("mass", reduced.mass)
            only_gathered = reduced.assignment is None and not step.reduction.reweight
            content = None if only_gathered else reduced.tokens
            self._enter_space(step, hidden, self.note("kept", reduced.kept), content, reduced.mass)

    def _operate(
        self,
        step: _Step,
        count: int,
        visual: fx.Node,
        mass: fx.Node | None,
        makers: Mapping[str, Callable[[], Any]],
    ) -> StaticOutput:
        """Emit the operator itself; nodes that nothing reads are dropped at the end."""
        features = _Features(makers)
        reduced = static_reduce(step.reduction, count, visual, mass, features, self.call)
        self.note("score", reduced.score)
        self.note("assignment", reduced.assignment)
        return reduced

    # *** token spaces ***

    def _enter_space(
        self,
        step: _Step,
        hidden: fx.Node,
        kept: fx.Node,
        reduced: fx.Node | None,
        mass: fx.Node | None,
    ) -> None:
        """Shorten the prompt to text and kept tokens, for everything behind this point."""
        space = self.space
        index = self.call(tokens.kept_in_prompt, space.visual, kept, hidden)
        shortened = self.call(tokens.take, hidden, index)
        visual = self.call(tokens.visual_after, space.visual, kept)
        if reduced is not None:
            shortened = self.call(tokens.put, shortened, visual, reduced)
        origin = index
        if space.origin is not None:
            origin = self.call(tokens.take, space.origin, index)
        self.note("origin", origin)
        self.space = _Space(visual, self._grid_of_kept(step, kept), origin, mass)
        replaced = self._new_positions(step.reduction, origin)
        key_bias = None
        if step.reduction.mass_bias and mass is not None:
            key_bias = self.call(
                tokens.mass_bias, mass, visual, shortened, step.reduction.mass_bias
            )
        open_space(self.graph, hidden, shortened, index, replaced, self.suffix)
        for node, here in self.positions.items():
            self.positions[node] = replaced.get(here, here)
        self.position_ids.add(self.positions[self.nodes["position_ids"]])
        for layer in self._layers_behind(index):
            bias_block(self.graph_module, layer, key_bias)
        self.spaces.append({"origin": origin} | ({"key_bias": key_bias} if key_bias else {}))

    def _new_positions(self, reduction: Reduction, origin: fx.Node) -> dict[fx.Node, fx.Node]:
        """Under ``compact``, position ids without gaps and the rotary tables made from them."""
        if reduction.position == "keep":
            return {}
        ids, *tables = self.positions
        compact = self.call(tokens.compact_positions, ids, origin)
        compact.meta["prompt_axes"] = ids.meta["prompt_axes"]
        replaced = {self.positions[ids]: compact}
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for table in tables:
            if order[table] < order[origin]:
                again = self.graph.node_copy(
                    table, lambda node: compact if node in self.position_ids else node
                )
                again.meta = dict(table.meta)
                replaced[self.positions[table]] = again
        return replaced

    def _layers_behind(self, node: fx.Node) -> list[fx.Node]:
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        return [
            layer
            for name, layer in self.nodes.items()
            if name.startswith("decoder_") and order[layer] > order[node]
        ]

    # *** features ***

    def _observe(
        self, block: fx.Node, needs: frozenset[str]
    ) -> tuple[Observations, fx.Node, fx.Node]:
        """Make a decoder layer report what is needed.

        Returns:
            The observations, the layer's hidden states and the node to insert before.
        """
        last = text = None
        with self.graph.inserting_before(block):
            if "attention_last" in needs:
                last = self.call(tokens.last_token, block.args[0], self._padding())
            if "attention_text" in needs:
                text = self.call(tokens.text_tokens, self.space.visual, block.args[0])
        return observe_block(self.graph_module, block, last, text, keys="keys" in needs)

    def _padding(self) -> fx.Node | None:
        """The 2-D attention mask in the current space, if the model was given one."""
        mask = self.nodes.get("attention_mask")
        if mask is None or self.space.origin is None:
            return mask
        return self.call(tokens.take, mask, self.space.origin)

    def _grid_of_kept(self, step: _Step, kept: fx.Node) -> fx.Node | torch.Tensor:
        """Image, row and column of what is left; still a constant if it was chosen by the grid."""
        grid = self.space.grid
        if step.reduction.selector == "grid" and isinstance(grid, torch.Tensor):
            return grid[select.grid_anchors(grid, step.count * self.layout.images)[0]]
        return self.call(tokens.take, grid[None] if isinstance(grid, torch.Tensor) else grid, kept)

    def _constant(self, value: torch.Tensor) -> fx.Node:
        """A buffer of the graph, so that it moves to the model's device with it."""
        names = (f"constant_{self.suffix}_{i}" for i in itertools.count())
        name = next(name for name in names if not hasattr(self.graph_module, name))
        device = next(self.graph_module.parameters()).device
        self.graph_module.register_buffer(name, value.to(device), persistent=False)
        return self.graph.get_attr(name)

    def add_output(self) -> None:
        """Let the graph return what decoding needs to know of each space."""
        output = self.graph.output_node()
        fields: Any = output.args[0]
        output.args = ({**fields, "spaces": self.spaces},)
