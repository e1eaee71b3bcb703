"""Lower a policy to static ops: TopK, Gather and MatMul with constant counts.

Each reduction becomes a few named nodes (score, top_k, nearest, merge, ...). What a policy does
not use leaves no node: a pruning policy's graph has no assignment and no matmul, an unused score
is never observed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from deos_fx import tokens
from deos_fx.operator import assign, scores, select, transfer
from deos_fx.passes.annotate_token_spaces import position_tables
from deos_fx.passes.find_sites import Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.observe_block import Observations, bias_block, observe_block
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
        for i, (reduction, count) in enumerate(zip(policy.reductions, counts, strict=True)):
            site = sites.usable(reduction.site, reduction.scores)
            with_mass = _mass_matters(policy.reductions[i:])
            step = _Step(reduction, count, reduction.site.replace(".", "_"), with_mass)
            if site.name == "projector":
                lowering.reduce_images(step)
            else:
                lowering.reduce_prompt(step, lowering.nodes[site.node])
        lowering.add_output()
    return finish(graph_module)


def _mass_matters(reductions: tuple[Reduction, ...]) -> bool:
    """Whether anything from the first of these reductions on reads masses."""
    biased = any(reduction.mass_bias for reduction in reductions)
    return biased or any(reduction.gain or reduction.residual for reduction in reductions[1:])


@dataclass(frozen=True)
class _Step:
    """One reduction to lower: how many tokens (per image) and the suffix of its nodes' names."""

    reduction: Reduction
    count: int
    suffix: str
    with_mass: bool


@dataclass
class _Visual:
    """The visual tokens at a site; a feature becomes a node when the operator asks for it."""

    total: int
    features: dict[str, Callable[[], fx.Node]]
    mass: fx.Node | None
    made: dict[str, fx.Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> fx.Node:
        if name not in self.made:
            self.made[name] = self.features[name]()
        return self.made[name]


@dataclass
class _Space:
    """The token space that the graph is in, from front to back."""

    visual: fx.Node
    count: int
    origin: fx.Node | None = None
    grid: fx.Node | None = None
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
        self.space = _Space(visual, count)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call_function node named after its function and the site."""
        name = f"{function.__name__}_{self.suffix}" if self.suffix else function.__name__
        return self.graph.create_node("call_function", function, args, {}, name)

    def note(self, role: str, node: fx.Node) -> fx.Node:
        """Mark a node for `ReducedModel.explain`."""
        node.meta["explains"] = (self.suffix, role)
        return node

    # *** the two kinds of site ***

    def reduce_images(self, step: _Step) -> None:
        """Reduce every image's features alone, then shorten the prompts' runs of placeholders."""
        self.suffix = step.suffix
        features = self.nodes[self.sites.features]
        per_image = self.layout.tokens_per_image
        available: dict[str, Callable[[], fx.Node]] = {
            "tokens": lambda: features,
            "grid": lambda: self._grid(1),
        }
        if "cls_attention" in step.reduction.scores:
            attention = self._class_attention(self.nodes[self.sites.tower_block])
            available["attention_cls"] = lambda: attention
        users = list(features.users)
        with self.graph.inserting_before(features.next):
            visual = _Visual(per_image, available, None)
            kept, reduced, mass = self._operate(step, visual)
            reduced = reduced or self.call(tokens.take, features, kept)
            for user in users:
                user.replace_input_with(features, reduced)
            images = self.layout.images
            kept = self.note("kept", self.call(tokens.kept_of_prompt, kept, images, per_image))
            if mass is not None:
                mass = self.note("mass", self.call(tokens.masses_of_prompt, mass, images))
        embeddings = self.nodes[self.sites.embeddings]
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        last = max((mass or kept, embeddings), key=order.__getitem__)
        with self.graph.inserting_before(last.next):
            self._enter_space(step, embeddings, kept, None, mass)

    def reduce_prompt(self, step: _Step, block: fx.Node) -> None:
        """Reduce all visual tokens of a prompt together, behind a decoder layer."""
        self.suffix = step.suffix
        seen, hidden, anchor = self._observe(block, _needs(step.reduction))
        with self.graph.inserting_before(anchor):
            visual = _Visual(
                self.space.count,
                {
                    "tokens": lambda: self.call(tokens.take, hidden, self.space.visual),
                    "keys": lambda: self.call(tokens.take, seen.key, self.space.visual),
                    "grid": lambda: self.space.grid or self._grid(self.layout.images),
                    "attention_last": lambda: self.call(
                        tokens.attention_to, seen.last, self.space.visual
                    ),
                    "attention_text": lambda: self.call(
                        tokens.text_attention_to,
                        seen.rows,
                        seen.text,
                        self.space.visual,
                        self._padding(),
                    ),
                },
                self.space.mass,
            )
            total = _Step(
                step.reduction, step.count * self.layout.images, step.suffix, step.with_mass
            )
            kept, reduced, mass = self._operate(total, visual)
            self.note("kept", kept)
            if mass is not None:
                self.note("mass", mass)
            self._enter_space(step, hidden, kept, reduced, mass)

    # *** the operator: score, keep, assign, transfer, reweight ***

    def _operate(
        self, step: _Step, visual: _Visual
    ) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
        """Emit one reduction: indices kept, new tokens (None: just gathered), new masses."""
        reduction = step.reduction
        score = self._score(reduction, visual)
        kept = self._select(step, visual, score)
        assignment, gain = self._assignment(reduction, visual, kept, score)
        mass = visual.mass
        reduced = None
        if assignment is not None:
            weight = None
            if reduction.weighting == "score":
                weight = self.call(transfer.importance, score)
            self.note("assignment", assignment)
            reduced = self.call(
                transfer.merge,
                visual["tokens"],
                kept,
                assignment,
                mass,
                weight,
                gain,
                reduction.exponent,
            )
            if step.with_mass:
                mass = self.call(transfer.merged_mass, kept, assignment, mass, gain)
        elif mass is not None:
            mass = self.call(tokens.take, mass, kept) if step.with_mass else None
        if reduction.reweight:
            reduced = reduced or self.call(tokens.take, visual["tokens"], kept)
            reduced = self.call(transfer.reweight, reduced, score, kept, reduction.reweight)
        return kept, reduced, mass if step.with_mass else None

    def _score(self, reduction: Reduction, visual: _Visual) -> fx.Node | None:
        """The mixed score; standardized only if more than its order is used."""
        if not reduction.uses_scores:
            return None
        values = [
            self.call(scores.SCORES[name].function, *map(visual.__getitem__, _score_needs(name)))
            for name in reduction.scores
        ]
        if len(values) > 1 or reduction.uses_score_values:
            values = [self.call(scores.standardize, value) for value in values]
        score = values[0]
        if len(values) > 1:
            score = self.call(scores.combine, values, list(reduction.scores.values()))
        if all(_score_needs(name) == ("grid",) for name in reduction.scores):
            score = self.call(select.for_each_row, score, visual["tokens"])
        return self.note("score", score)

    def _select(self, step: _Step, visual: _Visual, score: fx.Node | None) -> fx.Node:
        reduction = step.reduction
        if reduction.selector == "grid":
            anchors = self._constant("anchors", self._grid_anchors(step, visual))
            return self.call(select.for_each_row, anchors, visual["tokens"])
        if reduction.selector == "greedy":
            similarity = self._similarity(reduction, visual, None)
            return self.call(select.greedy, score, similarity, step.count, reduction.diversity)
        return self.call(select.top_k, score, step.count)

    def _assignment(
        self, reduction: Reduction, visual: _Visual, kept: fx.Node, score: fx.Node | None
    ) -> tuple[fx.Node | None, float]:
        """P and the gain it is used with; None for pure pruning."""
        assignment = None
        if reduction.gain and reduction.temperature == float("inf"):
            assignment = self.call(assign.uniform, kept, visual["tokens"])
        elif reduction.gain:
            similarity = self._similarity(reduction, visual, kept)
            if reduction.temperature == 0:
                assignment = self.call(assign.nearest, similarity, kept)
            else:
                assignment = self.call(assign.soft, similarity, kept, reduction.temperature)
        if reduction.has_rest:
            args = () if assignment is None else (assignment, reduction.gain)
            return self.call(transfer.residual, score, kept, *args), 1.0
        return assignment, reduction.gain

    def _similarity(self, reduction: Reduction, visual: _Visual, kept: fx.Node | None) -> fx.Node:
        features = [
            visual[needed] if kind in reduction.similarity else None
            for kind, needed in assign.SIMILARITIES.items()
        ]
        return self.call(assign.similarity, *features, dict(reduction.similarity), kept)

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
        all_tokens = self.layout.grid_tensor(self.layout.images)[None]
        grid = space.grid or self._constant("grid_before", all_tokens)
        grid = self.call(tokens.take, grid, kept)
        self.space = _Space(visual, step.count * self.layout.images, origin, grid, mass)
        replaced = self._new_positions(step.reduction, origin)
        key_bias = None
        if step.reduction.mass_bias and mass is not None:
            key_bias = self.call(
                tokens.mass_bias, mass, visual, shortened, step.reduction.mass_bias
            )
        open_space(self.graph, hidden, shortened, index, replaced)
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

    def _observe(self, block: fx.Node, needs: set[str]) -> tuple[Observations, fx.Node, fx.Node]:
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

    def _class_attention(self, block: fx.Node) -> fx.Node:
        with self.graph.inserting_before(block):
            query = self.call(tokens.class_token, block.args[0])
        seen, _, anchor = observe_block(self.graph_module, block, query, None, keys=False)
        with self.graph.inserting_before(anchor):
            return self.call(tokens.attention_to_patches, seen.last, self.sites.class_tokens)

    def _padding(self) -> fx.Node | None:
        """The 2-D attention mask in the current space, if the model was given one."""
        mask = self.nodes.get("attention_mask")
        if mask is None or self.space.origin is None:
            return mask
        return self.call(tokens.take, mask, self.space.origin)

    def _grid(self, images: int) -> fx.Node:
        return self._constant("grid", self.layout.grid_tensor(images))

    def _grid_anchors(self, step: _Step, visual: _Visual) -> torch.Tensor:
        images = visual.total // self.layout.tokens_per_image
        if images * self.layout.tokens_per_image != visual.total:
            raise ValueError(
                f"{step.reduction.site}: the selector 'grid' needs complete images, but an earlier "
                "reduction has removed tokens. Use it at the first site, or another selector here."
            )
        return select.grid_anchors(self.layout.grid_tensor(images), step.count)

    def _constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A buffer of the graph, so that it moves to the model's device with it."""
        name = f"{name}_{self.suffix}"
        device = next(self.graph_module.parameters()).device
        self.graph_module.register_buffer(name, value.to(device), persistent=False)
        return self.graph.get_attr(name)

    def add_output(self) -> None:
        """Let the graph return what decoding needs to know of each space."""
        output = self.graph.output_node()
        output.args = ({**output.args[0], "spaces": self.spaces},)


def _score_needs(name: str) -> tuple[str, ...]:
    return scores.SCORES[name].needs


def _needs(reduction: Reduction) -> set[str]:
    """Every feature that lowering this reduction will ask for."""
    needs = {assign.SIMILARITIES[kind] for kind in reduction.similarity}
    if not reduction.gain and reduction.selector != "greedy":
        needs = set()
    if reduction.uses_scores:
        needs |= {feature for name in reduction.scores for feature in _score_needs(name)}
    return needs
