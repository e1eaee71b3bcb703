"""Lower a policy to static ops: TopK, Gather and MatMul with constant counts.

Each reduction becomes a few named nodes (score, top_k, nearest, merge, ...). Parts that a policy
does not use leave no node: a pruning policy's graph has no assignment and no matmul, and an unused
score is never observed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from deos_fx import tokens
from deos_fx.attention.observation import OBSERVED
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import (
    StaticOutput,
    static_reduce,
)
from deos_fx.models.views import execution_device, has_several_devices
from deos_fx.passes.analyse.annotate_token_spaces import MASK, padding_node, position_tables
from deos_fx.passes.analyse.check_reduction import check_reduction
from deos_fx.passes.analyse.find_sites import Site, Sites
from deos_fx.passes.finish import finish
from deos_fx.passes.graph import blocks_behind, users_behind
from deos_fx.passes.lower.insert_visual_positions import insert_visual_positions
from deos_fx.passes.lower.open_space import open_space
from deos_fx.passes.observe.observe_block import bias_block
from deos_fx.passes.observe.prompt_features import PromptFeatures
from deos_fx.passes.observe.prompt_text import PromptText
from deos_fx.passes.observe.tower_features import TowerFeatures
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.tokens.layout import PromptLayout, grid_after, grid_of_prompt, rule_before_decoder

__all__ = ["lower_reductions"]


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
        decoder together, and one for each reduction in it. A dict has ``origin`` [B, M] (original
        prompt positions of the tokens that are left); if later attention is biased by mass,
        ``key_bias`` [B, M]; and under the position rule ``grid``, ``shift`` [B, 1], how far later
        tokens move up.

    Raises:
        ValueError: If a site does not exist, cannot be used or lacks a score the policy needs.
    """
    if not policy.is_empty:
        if layout.packed:
            _see_borders(graph_module, layout.packed)
        _check_masks(graph_module)
        counts = zip(*map(policy.counts, layout.sizes), strict=True)
        steps = [
            _Step(reduction, of_images, check_reduction(graph_module, sites, reduction, layout))
            for reduction, of_images in zip(policy.reductions, counts, strict=True)
        ]
        lowering = _Lowering(graph_module, sites, layout, steps)
        # Before the decoder, each image is reduced alone.
        of_images = [step for step in steps if step.stage != "decoder"]
        for step in of_images:
            if sites.merged:
                lowering.reduce_merged(step)
            else:
                lowering.reduce_images(step)
        # Merged features are reduced in the prompt; otherwise the prompt is still whole.
        if of_images and not sites.merged:
            lowering.shorten_prompt(of_images)
        # In the decoder, all visual tokens of a prompt are reduced together.
        in_decoder = steps[len(of_images) :]
        if in_decoder:
            lowering.enter_decoder()
        for step in in_decoder:
            lowering.reduce_prompt(step)
        lowering.add_output()
    return finish(graph_module)


def _see_borders(graph_module: fx.GraphModule, given: str) -> None:
    """Let masks be made in the original prompt, where positions say where samples begin.

    Masks that are no longer marked as plain stay there (see `open_space`). In a reduced space,
    dropped tokens leave gaps in the positions, which would look like such borders.

    Args:
        graph_module: The graph. Its annotations change.
        given: The input that marks packed samples, in words.

    Raises:
        ValueError: If the model's masks do not keep the samples apart.
    """
    by_mask = bool(graph_module.graph.find_nodes(op="placeholder", target="attention_mask"))
    for node in graph_module.graph.find_nodes(op="call_module"):
        if "plain_mask" not in node.meta or not _is_of_decoder(node):
            continue
        builder: Any = graph_module.get_submodule(str(node.target))
        if node.meta["padding"] or not (by_mask or builder.keeps_apart(node.kwargs)):
            raise ValueError(
                f"There is {given}, and this model does not keep the samples of a row apart by "
                f"that (in its {node.name}). Give every sample a row of its own."
            )
        node.meta["plain_mask"] = False


def _is_of_decoder(mask: fx.Node) -> bool:
    """Return whether decoder layers read a mask, or another mask that is made of it."""
    of_masks = [user for user in mask.users if user.meta.get("prompt_axes") == MASK]
    read = any(user.name.startswith("decoder_") for user in mask.users)
    return read or any(map(_is_of_decoder, of_masks))


def _check_masks(graph_module: fx.GraphModule) -> None:
    """Refuse attention kernels that take windows and blocks as sizes, which reductions change.

    Raises:
        ValueError: If the model has other masks than plain causal ones and such kernels.
    """
    for node in graph_module.graph.find_nodes(op="call_module"):
        if node.meta.get("plain_mask", True):
            continue
        builder: Any = graph_module.get_submodule(str(node.target))
        implementation = str(builder.config.get_text_config()._attn_implementation)
        if implementation.startswith(("flash", "kernels")):
            raise ValueError(
                f"The attention implementation {implementation!r} has no mask of windows, "
                "blocks of image tokens and packed samples: where tokens were dropped it would "
                "count them wrongly. "
                "Load the model with attn_implementation='sdpa'."
            )


@dataclass(frozen=True)
class _Step:
    """One reduction to lower.

    Attributes:
        reduction: The reduction.
        counts: Number of tokens that it keeps of each image.
        site: Its site.
    """

    reduction: Reduction
    counts: tuple[int, ...]
    site: Site

    @property
    def count(self) -> int:
        """Return the number of tokens kept of one image, where it is the same for all images."""
        (count,) = set(self.counts)
        return count

    @property
    def stage(self) -> str:
        """Return the stage of its site: ``vision``, ``projector`` or ``decoder``."""
        return split_site(self.reduction.site)[0]

    @property
    def suffix(self) -> str:
        """Return the suffix of its nodes' names, such as ``decoder2``: fx would count up ``_2``."""
        return self.reduction.site.replace(".", "")


@dataclass
class _Images:
    """The tokens that are left of each image before the decoder; updated from site to site.

    Attributes:
        grid: Image, row and column of every token: a constant [V, 3] until scores choose tokens.
        kept: [I, K] indices of the image's own tokens that are left; None as long as all are.
        mass: [I, K] masses; None while every mass is 1.
        cut: Features of the latest site in the tower, and the indices [I, K] kept there.
    """

    grid: fx.Node | torch.Tensor
    kept: fx.Node | None = None
    mass: fx.Node | None = None
    cut: tuple[TowerFeatures, fx.Node] | None = None


@dataclass
class _Space:
    """The token space that the prompt is in; replaced from site to site.

    Attributes:
        visual: Positions [B, V] of the visual tokens in this space.
        grid: Image, row and column of every visual token.
        origin: Original prompt positions [B, M] of its tokens; None in the original space.
        mass: Masses [B, V] of the visual tokens; None while every mass is 1.
        padding: The 2-D attention mask in this space, once it was asked for.
    """

    visual: fx.Node
    grid: fx.Node | torch.Tensor
    origin: fx.Node | None = None
    mass: fx.Node | None = None
    padding: fx.Node | None = None


class _Lowering:
    """Inserts reductions in order of depth and keeps track of the token space.

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
        steps: Sequence[_Step],
    ) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.sites = sites
        self.layout = layout
        self.steps = steps
        self.done: list[str] = []
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.suffix = ""
        self.several_devices = has_several_devices(graph_module)
        self.spaces: list[dict[str, fx.Node]] = []
        # Position ids and rotary tables: original node -> node in the current space.
        sources = [self.nodes["position_ids"], *position_tables(graph_module)]
        self.positions = {node: node for node in sources}
        # The position ids of every space so far: a rotary table may read any of them.
        self.position_ids = {sources[0]}
        # State of the walk before the first site: nothing is reduced.
        visual = insert_visual_positions(graph_module, sites, layout, self.call)
        self.placeholders = self.note("visual", visual)
        self.images = _Images(layout.grid_tensor(1))
        self.space = _Space(visual, layout.grid_tensor(layout.images))
        mask = padding_node(graph_module)
        self.text = PromptText(self.call, self.nodes[sites.embeddings], visual, mask)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Emit a call_function node, named after its function and the site.

        A call on constants alone (anchors on the grid) is computed at once.

        Args:
            function: The function.
            *args: Its arguments: nodes, tensors (which become buffers of the graph) or constants.

        Returns:
            The node, or the value of a call on constants.
        """
        leaves = pytree.tree_leaves(args)
        if not any(isinstance(leaf, fx.Node) for leaf in leaves):
            return function(*args)
        args = pytree.tree_map_only(torch.Tensor, self._constant, args)
        name = f"{function.__name__}_{self.suffix}" if self.suffix else function.__name__
        return self.graph.create_node("call_function", function, args, {}, name)

    def _call_beside(self, visual: fx.Node, function: Callable[..., Any], *args: Any) -> Any:
        """Like `call`, after moving every argument to the device of the visual tokens.

        Masses, grids and votes may be on the device of earlier layers or of the inputs.
        """
        kinds = (fx.Node, torch.Tensor)
        if not any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(args)):
            return function(*args)
        moved = partial(self.call, tokens.beside)
        return self.call(
            function, *pytree.tree_map_only(kinds, lambda value: moved(value, visual), args)
        )

    def note(self, role: str, node: Any) -> Any:
        """Mark a node, or a constant, for `ReducedModel.explain`, and return it."""
        if isinstance(node, fx.Node):
            node.meta.setdefault("explains", []).append((self.suffix, role))
        elif node is not None:
            self.graph_module.meta.setdefault("explains", {})[self.suffix, role] = node
        return node

    # *** the kinds of site ***

    def reduce_images(self, step: _Step) -> None:
        """Reduce every image alone: its patches in the tower, or its features after it."""
        self.suffix = step.suffix
        images = self.images
        in_tower = step.stage == "vision"
        class_tokens = self.sites.class_tokens if in_tower else 0
        features = self._image_features(step)
        whole, anchor = features.hidden, features.anchor
        if not in_tower:
            # At the projector, a block of the tower is observed, but its features are reduced.
            whole = self.nodes[self.sites.features]
            anchor = whole.next
        users = users_behind(whole, anchor)
        with self.graph.inserting_before(anchor):
            own = self.call(tokens.without_class, whole, class_tokens) if class_tokens else whole
            reduced = self._operate(
                step, step.count, own, images.mass, features, self._last_of(self.layout.images)
            )
            left = reduced.tokens
            if class_tokens:
                left = self.call(tokens.with_patches, whole, left, class_tokens)
            for user in users:
                user.replace_input_with(whole, left)
            kept, mass = self.note("kept", reduced.kept), self.note("mass", reduced.mass)
            kept_so_far = kept
            # Case: not the first reduction. Indices into what the one before kept become indices
            # into the image's own tokens; out of order, a -1 stands for a copy of the CLS token.
            if images.kept is not None:
                in_order = step.reduction.order == "position"
                compose = tokens.take if in_order else tokens.kept_of_kept
                kept_so_far = self.call(compose, images.kept, kept)
            grid = self._grid_of_kept(step, step.count, images.grid, kept)
            self.images = _Images(grid, kept_so_far, mass)
            if in_tower:
                self.images.cut = features, kept
                self._bias_tower(step, left)

    def reduce_merged(self, step: _Step) -> None:
        """Reduce every image alone where its features are already in the prompt."""
        self.suffix = step.suffix
        hidden, layout = self.nodes[self.sites.features], self.layout
        # After both the prompt and the visual tokens' positions.
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        anchor = max(hidden, self.space.visual, key=order.__getitem__).next
        with self.graph.inserting_before(anchor):
            parts = [self._reduce_alike(step, hidden, alike) for alike in layout.alike()]
            kept, left, mass = parts[0] if len(parts) == 1 else self._in_order(parts)
            self._enter_space(
                hidden,
                kept,
                left,
                mass,
                grid=self._grid_of_prompt(kept),
                position=step.reduction.position,
                beta=step.reduction.mass_bias,
            )

    def _reduce_alike(
        self, step: _Step, hidden: fx.Node, alike: Sequence[int]
    ) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
        """Reduce the images of one size, whose features are already in the prompts.

        Args:
            step: The reduction.
            hidden: The prompts [B, N, d].
            alike: Numbers of these images in a prompt.

        Returns:
            Indices [B, K] of the kept tokens among a prompt's visual tokens; the reduced tokens
            [B, K, d], or None if the kept ones are unchanged; and their masses [B, K], or None if
            all are 1.
        """
        layout, visual, cells = self.layout, self.space.visual, self.images.grid
        columns = None
        if len(alike) < layout.images:
            # Case: images of several sizes. Take the visual tokens of these images alone.
            whole = layout.grid_tensor(layout.images)
            columns = torch.isin(whole[:, 0], torch.tensor(alike)).nonzero()[:, 0]
            cells = whole[columns[: layout.sizes[alike[0]]]]
            visual = self.call(torch.index_select, visual, 1, columns)
        features = self._image_features(step, cells, len(alike))
        own = self.call(tokens.of_images, self.call(tokens.take, hidden, visual), len(alike))
        count = step.counts[alike[0]]
        # The last image of a prompt has to keep its last token if that ends the prompt.
        ends = alike[-1] == layout.images - 1
        last_of = self._last_of(len(alike)) if ends else 0
        reduced = self._operate(step, count, own, None, features, last_of)
        kept = self.note("kept", reduced.kept)
        mass = self.note("mass", reduced.mass)
        # Tokens that are only gathered need not be written back: the prompt has them.
        only_gathered = reduced.assignment is None and not step.reduction.reweight
        left = None if only_gathered else self.call(tokens.of_prompts, reduced.tokens, len(alike))
        if mass is not None:
            mass = self.call(tokens.masses_of_prompt, mass, len(alike))
        self.images = _Images(self._grid_of_kept(step, count, cells, kept), kept, mass)
        kept = self.call(tokens.kept_of_prompt, kept, len(alike), layout.sizes[alike[0]])
        if columns is not None:
            # Back from indices into these images' tokens to those into all visual tokens.
            kept = self.call(tokens.take, columns[None], kept)
        return kept, left, mass

    def _in_order(
        self, parts: Sequence[tuple[fx.Node, fx.Node | None, fx.Node | None]]
    ) -> tuple[Any, Any, Any]:
        """Join what is left of the images of each size, in the order of the prompt.

        Args:
            parts: Results of `_reduce_alike`.

        Returns:
            Such a result for all images together.
        """
        kept, left, mass = (
            None if any(part is None for part in same) else self.call(torch.cat, same, 1)
            for same in map(list, zip(*parts, strict=True))
        )
        order = self.call(torch.argsort, kept, 1)
        whole = self.layout.grid_tensor(self.layout.images)[None]
        kept, left, mass = (
            None if same is None else self.call(tokens.take, same, order)
            for same in (kept, left, mass)
        )
        self.images = _Images(self.call(tokens.known_of_kept, whole, kept), kept, mass)
        return kept, left, mass

    def shorten_prompt(self, steps: Sequence[_Step]) -> None:
        """Shorten the prompts' runs of placeholders to the tokens that are left of each image."""
        last, left = steps[-1], self.images
        images, per_image = self.layout.images, self.layout.tokens_per_image
        # Insert after everything that is read.
        embeddings = self.nodes[self.sites.embeddings]
        made = [node for node in (left.kept, left.mass, embeddings) if node is not None]
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        with self.graph.inserting_before(max(made, key=order.__getitem__).next):
            if all(step.reduction.order == "position" for step in steps):
                # Case: features in the order of the image take the kept tokens' own placeholders.
                kept = self.call(tokens.kept_of_prompt, left.kept, images, per_image)
                grid = self._grid_of_prompt(kept)
            else:
                # Case: another order. Each image takes its first placeholders, or its last ones if
                # the placeholder at the end of the prompt has to stay. A -1 (a copy of the CLS
                # token) gets the cell of the first patch.
                patches = self.call(torch.clamp, left.kept, 0)
                patches = self.call(tokens.kept_of_prompt, patches, images, per_image)
                grid = self._grid_of_prompt(patches)
                ends = self.layout.ends
                slots = tokens.last_of_prompt if ends else tokens.first_of_prompt
                kept = self.call(slots, left.kept, images, per_image)
            mass = left.mass
            if mass is not None:
                mass = self.call(tokens.masses_of_prompt, mass, images)
            self._enter_space(
                embeddings,
                kept,
                None,
                mass,
                grid=grid,
                position=rule_before_decoder(step.reduction for step in steps),
                # Masses that arise in the tower bias the attention of the tower only.
                beta=0.0 if last.stage == "vision" else last.reduction.mass_bias,
            )

    def reduce_prompt(self, step: _Step) -> None:
        """Reduce all visual tokens of a prompt together, after a decoder layer."""
        self.suffix = step.suffix
        space = self.space
        features = self._prompt_features(step)
        hidden = features.hidden
        with self.graph.inserting_before(features.anchor):
            visual = self.call(tokens.take, hidden, space.visual)
            count = sum(step.counts)
            reduced = self._operate(step, count, visual, space.mass, features, self._last_of(1))
            self.note("mass", reduced.mass)
            # Tokens that are only gathered need not be written back: the prompt has them.
            only_gathered = reduced.assignment is None and not step.reduction.reweight
            kept = self.note("kept", reduced.kept)
            self._enter_space(
                hidden,
                kept,
                None if only_gathered else reduced.tokens,
                reduced.mass,
                grid=self._grid_of_kept(step, count, space.grid, kept),
                position=step.reduction.position,
                beta=step.reduction.mass_bias,
            )

    def _last_of(self, images: int) -> int:
        """Return `images` if prompts end in a visual token, else 0.

        One of so many rows of the reduction is then the last of its prompt, and its last token
        must stay.
        """
        return images if self.layout.ends else 0

    def _operate(
        self,
        step: _Step,
        count: int,
        visual: fx.Node,
        mass: fx.Node | None,
        features: Mapping[str, Any],
        last_of: int,
    ) -> StaticOutput:
        """Emit the operator itself; nodes that nothing reads are dropped at the end."""
        self.done.append(step.site.name)
        call = partial(self._call_beside, visual) if self.several_devices else self.call
        reduced = static_reduce(step.reduction, count, visual, mass, features, call, last_of)
        self.note("score", reduced.score)
        self.note("assignment", reduced.assignment)
        if reduced.assignment is not None:
            self.note("receivers", reduced.receivers)
            self.note("sources", reduced.sources)
        return reduced

    # *** token spaces ***

    def _enter_space(
        self,
        hidden: fx.Node,
        kept: fx.Node,
        reduced: fx.Node | None,
        mass: fx.Node | None,
        *,
        grid: fx.Node | torch.Tensor,
        position: str,
        beta: float,
    ) -> None:
        """Shorten the prompt to text and kept tokens, for everything after this point.

        Args:
            hidden: The prompt [B, N, d] in the current space.
            kept: Indices [B, K] into its visual tokens.
            reduced: The reduced tokens [B, K, d]; None if the kept ones are unchanged.
            mass: Their masses [B, K]; None if all are 1.
            grid: Image, row and column of every kept token.
            position: The rule for positions: ``keep``, ``compact`` or ``grid``.
            beta: How strongly masses bias later attention.
        """
        # 1. The hidden states in the new space.
        space = self.space
        index = self.call(tokens.kept_in_prompt, space.visual, kept, hidden)
        shortened = self.call(tokens.take, hidden, index)
        visual = self.call(tokens.visual_after, space.visual, kept)
        if reduced is not None:
            shortened = self.call(tokens.put, shortened, visual, reduced)
        # 2. Original positions: `index` itself in the first space, else looked up in the last one.
        origin = index
        if space.origin is not None:
            origin = self.call(tokens.take, space.origin, index)
        self.space = _Space(visual, grid, origin, mass)
        # 3. Position ids and rotary tables.
        trailing = None
        if position == "grid":
            ids = self.nodes["position_ids"]
            where = (origin, self.placeholders, ids, self.layout.images)
            trailing = self.call(tokens.trailing, *where)
        replaced = self._new_positions(position, origin, trailing)
        # 4. The rest of the graph: re-indexed values, positions, and the bias of later attention.
        key_bias = None
        if beta and mass is not None:
            key_bias = self.call(tokens.mass_bias, mass, visual, shortened, beta)
        open_space(self.graph, hidden, shortened, index, replaced, self.suffix)
        # `open_space` has added what it re-indexed, including position ids that are kept.
        for node, here in self.positions.items():
            self.positions[node] = replaced.get(here, here)
        self.position_ids.add(self.positions[self.nodes["position_ids"]])
        for layer in blocks_behind(index, "decoder"):
            bias_block(self.graph_module, layer, key_bias)
        # 5. What decoding needs to know of the space.
        left = {"origin": origin} | ({"key_bias": key_bias} if key_bias else {})
        if trailing is not None:
            left["shift"] = self.call(tokens.shift_of, trailing)
        self.spaces.append(left)

    def _bias_tower(self, step: _Step, left: fx.Node) -> None:
        """Bias the attention of the later blocks of the tower by the masses of their patches."""
        beta, mass = step.reduction.mass_bias, self.images.mass
        key_bias = None
        if beta and mass is not None:
            key_bias = self.call(tokens.patch_bias, mass, self.sites.class_tokens, beta)
        for block in blocks_behind(left, "vision"):
            bias_block(self.graph_module, block, key_bias)

    def _new_positions(
        self, position: str, origin: fx.Node, trailing: fx.Node | None
    ) -> dict[fx.Node, fx.Node]:
        """Emit new position ids and the rotary tables made from them, unless positions are kept.

        Args:
            position: The rule for positions.
            origin: Original prompt positions [B, M] of the tokens of the new space.
            trailing: Under the rule ``grid``: flags [B, N] of the dropped tokens at the ends of
                images.

        Returns:
            Position ids and tables of the current space -> those of the new space.
        """
        if position == "keep":
            return {}
        ids, *tables = self.positions
        # Always from the positions of the original prompt, never from those of the space before.
        if trailing is None:
            moved = self.call(tokens.compact_positions, ids, origin)
        else:
            moved = self.call(tokens.grid_positions, ids, trailing, origin)
        moved.meta["prompt_axes"] = ids.meta["prompt_axes"]
        replaced = {self.positions[ids]: moved}
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for table in tables:
            # Only a table made before this point has to be made again.
            if order[table] < order[origin]:
                again = self.graph.node_copy(
                    table, lambda node: moved if node in self.position_ids else node
                )
                again.meta = dict(table.meta)
                replaced[self.positions[table]] = again
        return replaced

    # *** features ***

    def _image_features(
        self, step: _Step, grid: fx.Node | torch.Tensor | None = None, images: int | None = None
    ) -> TowerFeatures:
        """Make the features of a reduction of images.

        A cut after the last block and one at the projector observe the same block. The features of
        the second are then observed at the first and read at the tokens that are left.

        Args:
            step: The reduction.
            grid: Image, row and column of the tokens; None for those of `images`.
            images: Images of a prompt that are reduced; None for all.

        Returns:
            The features.
        """
        block = self.nodes[step.site.node if step.stage == "vision" else self.sites.tower_block]
        needs = required_features(step.reduction)
        cells = self.images.grid if grid is None else grid
        makers: dict[str, Callable[[], Any]] = {"grid": lambda: cells}
        cut = self.images.cut
        if step.stage == "projector" and cut is not None and cut[0].block is block:
            # Case: the second of the two.
            makers |= {name: partial(self._since_cut, name) for name in needs & OBSERVED.keys()}
        elif block.name == self.sites.tower_block:
            # Case: perhaps the first of the two.
            for other in self.steps:
                if other.stage == "projector":
                    needs |= required_features(other.reduction) & OBSERVED.keys()
        return TowerFeatures(
            self.graph_module,
            step.site.name,
            block,
            needs - makers.keys(),
            self.call,
            class_tokens=self.sites.class_tokens,
            text=self.text,
            images=self.layout.images if images is None else images,
            reduced=self.done,
            makers=makers,
        )

    def _since_cut(self, name: str) -> fx.Node:
        """Read a feature of the block before the latest cut at the tokens that this cut left."""
        assert self.images.cut is not None
        features, kept = self.images.cut
        return self.call(tokens.known_of_kept, features[name], kept)

    def _prompt_features(self, step: _Step) -> PromptFeatures:
        """Make the features of a reduction in the decoder."""
        space = self.space
        return PromptFeatures(
            self.graph_module,
            step.site.name,
            self.nodes[step.site.node],
            required_features(step.reduction),
            self.call,
            visual=space.visual,
            padding=self._padding,
            text=self.text,
            reduced=self.done,
            makers={"grid": lambda: space.grid},
        )

    def enter_decoder(self) -> None:
        """Let later reductions see the text as it enters the first decoder layer."""
        first = self.nodes["decoder_0"]
        with self.graph.inserting_before(first):
            padding = self._padding()
        embeddings: Any = first.args[0]
        self.text = PromptText(self.call, embeddings, self.space.visual, padding, before=first)

    def _padding(self) -> fx.Node | None:
        """Return the 2-D attention mask in the current space; None if the call has none."""
        mask, space = padding_node(self.graph_module), self.space
        if mask is None or space.origin is None:
            return mask
        if space.padding is None:
            space.padding = self.call(tokens.take, mask, space.origin)
        return space.padding

    def _grid_of_kept(
        self, step: _Step, count: int, grid: fx.Node | torch.Tensor, kept: fx.Node
    ) -> fx.Node | torch.Tensor:
        """Return image, row and column of every kept token.

        They are still a constant if the grid alone chose the tokens.

        Args:
            step: The reduction.
            count: K, the number of tokens that it keeps.
            grid: Image, row and column of the tokens before it.
            kept: Indices [B, K] of the kept tokens.
        """
        if isinstance(grid, fx.Node):
            # Case: scores chose the tokens at an earlier site.
            return self.call(tokens.known_of_kept, grid, kept)
        # Case: the grid has been a constant so far.
        left = grid_after(step.reduction, count, grid)
        return self.call(tokens.known_of_kept, grid[None], kept) if left is None else left

    def _grid_of_prompt(self, kept: fx.Node) -> fx.Node | torch.Tensor:
        """Return image, row and column of the tokens that are left of all images of a prompt.

        Args:
            kept: Their indices [B, K] among the prompt's visual tokens.
        """
        grid = self.images.grid
        if isinstance(grid, torch.Tensor):
            # The same places of each image are left.
            return grid_of_prompt(grid, self.layout.images)
        whole = self.layout.grid_tensor(self.layout.images)[None]
        return self.call(tokens.known_of_kept, whole, kept)

    def _constant(self, value: torch.Tensor) -> fx.Node:
        """Store a constant as a buffer of the graph, which moves between devices with it."""
        names = (f"constant_{self.suffix}_{i}" for i in itertools.count())
        name = next(name for name in names if not hasattr(self.graph_module, name))
        with torch.inference_mode(False):
            constant = value.to(execution_device(self.graph_module), copy=True)
        self.graph_module.register_buffer(name, constant, persistent=False)
        return self.graph.get_attr(name)

    def add_output(self) -> None:
        """Let the graph return what decoding needs to know of each space."""
        output = self.graph.output_node()
        fields: Any = output.args[0]
        output.args = ({**fields, "spaces": self.spaces},)
