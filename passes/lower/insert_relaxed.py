"""Insert relaxed reductions, which are differentiable.

The graph is that of the static form, with two differences. At each site a module stands for the
operators: it moves content between visual tokens, and lowers the gates of those that would be
dropped; later attention gets the log-gates as a bias on its keys, and layers that convolve or keep
a state run over the open tokens alone. And some of the others stay in the sequence, or all (see
`RelaxedReduction.runners_up`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deos_fx import tokens
from deos_fx.forms.needs import feature_name
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.forms.static import StaticOutput
from deos_fx.models.blocks import counts_positions
from deos_fx.operator.assign import SIMILARITIES
from deos_fx.operator.learned import LEARNED
from deos_fx.operator.scores import SCORES
from deos_fx.passes.analyse.check_reduction import check_masks, check_reduction
from deos_fx.passes.analyse.sites import Sites
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.lower.lower_reductions import Lowering, Part
from deos_fx.passes.lower.open_only import open_only
from deos_fx.passes.lower.steps import Group, Inside, Place, Step
from deos_fx.passes.notes import note_of
from deos_fx.policy.site import site_order
from deos_fx.tokens.layout import PromptLayout

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Apply the reduction.

        Args:
            visual: Visual tokens [B, V, d].
            alive: Gates so far [B, V].
            mass: Masses [B, V].
            beta: 0-dim, mass bias so far.
            *features: In the order of ``self.features``.

        Returns:
            Tokens [B, C, d], their indices, gates and masses [B, C], and the mass bias.
        """
        named = dict(zip(self.features, features, strict=True))
        result = self.reduction(visual, alive, mass, named, self.last_of)
        left = result.tokens, result.kept, result.alive, result.mass
        return *left, self.reduction.bias_after(beta)


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
        The same graph module. Its output gains ``spaces``, as in the static form, and ``gates``:
        one [B, C] for each site, in order of depth.

    Raises:
        ValueError: If a site cannot be used or lacks a score, or a layer takes no bias.
    """
    _check_layers(graph_module)
    steps = []
    for name in sorted(reductions, key=site_order):
        # The checks know static reductions. What a relaxed one needs does not change while it is
        # trained, so its start stands for it.
        start = replace(reductions[name].start, site=name)
        site = check_reduction(graph_module, sites, start, layout)
        # Counts are up to the module.
        steps.append(Step(start, site, _needs(reductions[name]), layout.sizes))
    check_masks(graph_module, layout.packed)
    return _Insertion(graph_module, sites, layout, steps, reductions).walk()


def _check_layers(graph_module: fx.GraphModule) -> None:
    """Refuse layers for which a half open token is more than a key.

    1. Layers that attend and keep a state at once: such a token is for one of the two.
    2. Layers that count positions themselves: it counts as a whole one.
    3. Layers that choose keys by an index: it is chosen or not, and what it counts for has no
       gradient.

    Raises:
        ValueError: If a decoder layer takes a mask of queries and keys and one of padding, counts
            positions or chooses keys.
    """
    for layer in blocks_of(graph_module.graph, "decoder").values():
        if note_of(layer).indexes:
            raise ValueError(
                f"{layer.name} chooses the keys that a token sees by an index, which takes a token "
                "or leaves it: reductions of this model cannot be searched by gradient. Give a "
                "policy."
            )
        masks = {x.padding for x in map(note_of, layer.all_input_nodes) if x.is_mask}
        if len(masks) > 1:
            raise ValueError(
                f"{layer.name} gets a mask of keys and one of padding, for a state, which sees a "
                "token that is half gone as it sees any other: reductions of this model cannot be "
                "searched by gradient. Give a policy."
            )
        if counts_positions(graph_module.get_submodule(str(layer.target))):
            raise ValueError(
                f"{layer.name} counts the tokens that it gets, and in a search these are all of "
                "them: reductions of this model cannot be searched by gradient. Give a policy."
            )


class _Insertion(Lowering):
    """Emits modules in place of static operators; gates and masses flow from one to the next.

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
        # 0-dim, how strongly masses bias attention; None for 0.
        self.beta: fx.Node | None = None
        # Whether gates are those of images [I, C], which have not entered the prompt.
        self.of_images = False
        self.gates: list[fx.Node] = []

    def outputs(self) -> dict[str, Any]:
        """Return the spaces, and the gates of every site."""
        return super().outputs() | {"gates": self.gates}

    def reduce_images(
        self, step: Step, place: Place, put_back: Callable[[fx.Node], fx.Node]
    ) -> None:
        """Reduce every image alone: its patches in the tower, or its features after it."""
        if step.stage != "vision":
            # Masses bias attention only in the stage in which they arise.
            self.beta = None
        super().reduce_images(step, place, put_back)
        # Gates of images [I, C] are reported as gates of prompts, like those in the decoder.
        self.gates.append(self.call(tokens.masses_of_prompt, self.alive, self.layout.images))

    def reduce_inside(self, steps: Sequence[Step]) -> Inside:
        """Refuse groups of patches in the tower of an encoder that is one node."""
        raise ValueError(f"{steps[0].site.name}: groups of patches have no relaxed form.")

    def reduce_merged(self, step: Step, groups: Sequence[Group]) -> None:
        """Reduce images that are already in the prompt, each of them alone."""
        # In a search, all images of a batch have one size, so there is one group.
        (group,) = groups
        super().reduce_merged(step, [group])
        assert self.alive is not None
        self.gates.append(self.alive)

    def enter_prompt(self, steps: Sequence[Step]) -> None:
        """Turn gates and masses of each image into those of a prompt, for all decoder layers."""
        if steps[-1].stage == "vision":
            # Masses that arise in the tower bias the attention of the tower only.
            self.beta = None
        super().enter_prompt(steps)

    def reduce_prompt(self, step: Step, place: Place) -> None:
        """Reduce all visual tokens of a prompt together, after a decoder layer."""
        super().reduce_prompt(step, place)
        assert self.alive is not None
        self.gates.append(self.alive)

    def tower_bias(self, beta: float) -> fx.Node:
        """Emit the bias [I, c + C] of gates and masses; class tokens have no gate."""
        given = (self.alive, self.mass, self._beta(), self.sites.class_tokens)
        return self.call(tokens.patch_gate_bias, *given)

    def prompt_bias(self, beta: float, visual: fx.Node, hidden: fx.Node) -> fx.Node:
        """Emit the bias [B, M] of gates and masses, and the gates themselves."""
        self.prompt_gates = self.call(tokens.prompt_gates, self.alive, visual, hidden)
        return self.call(tokens.gate_bias, self.alive, self.mass, self._beta(), visual, hidden)

    def _beta(self) -> fx.Node:
        """Return the node of the mass bias so far."""
        return self.emitter.constant(torch.zeros(())) if self.beta is None else self.beta

    def _shorten(
        self,
        hidden: fx.Node,
        left: Part,
        grid: fx.Node | torch.Tensor,
        position: str,
        beta: float,
    ) -> None:
        """Shorten the prompt to the tokens that stay; gates of images become those of a prompt."""
        if self.of_images:
            self.alive = self.call(tokens.masses_of_prompt, self.alive, self.layout.images)
            self.of_images = False
        super()._shorten(hidden, left, grid, position, beta)

    def enter_layer(self, layer: fx.Node) -> None:
        """Let gates reach a layer that attention's bias does not."""
        open_only(self.graph_module, layer, self.prompt_gates)

    def _operate(
        self,
        step: Step,
        count: int,
        place: Place,
        mass: fx.Node | None,
        last_of: int,
    ) -> StaticOutput:
        """Insert the reduction's module, and update the gates and the mass bias."""
        names = tuple(sorted(step.needs))
        target = f"reduce_{self.emitter.suffix}"
        reduction = self.reductions[step.site.name]
        site = RelaxedSite(reduction, names, last_of)
        self.graph_module.add_submodule(target, site)
        # At the first site, nothing has been lost.
        ones = self.call(tokens.ones_like_tokens, place.own)
        gates = ones if self.alive is None else self.alive
        # Looking a feature up emits its nodes. The grid is a constant, and becomes a buffer.
        read = [place.features[name] for name in names]
        read = pytree.tree_map_only(torch.Tensor, self.emitter.constant, read)
        given = (place.own, gates, ones if mass is None else mass, self._beta(), *read)
        node = self.graph.call_module(target, given)
        # The module returns a tuple: tokens, indices, gates, masses and mass bias. The indices come
        # last, since the prompt is shortened right after them.
        parts = {i: self.call(operator.getitem, node, i) for i in (0, 2, 3, 4, 1)}
        reduced, kept, self.alive, left, self.beta = (parts[i] for i in range(5))
        self.of_images = step.stage != "decoder"
        return StaticOutput(reduced, kept, left, None, kept, None, None, None)

    def _written(self, step: Step, reduced: StaticOutput) -> fx.Node:
        """Return the tokens: all have to be written into the prompt."""
        return reduced.tokens

    def _cells_of_kept(
        self, step: Step, count: int, cells: fx.Node | torch.Tensor, kept: fx.Node
    ) -> fx.Node | torch.Tensor:
        """Return image, row and column of every token that stays."""
        if self.reductions[step.site.name].runners_up is None:
            # Case: all stay, so the grid is what it was.
            return cells
        whole = cells if isinstance(cells, fx.Node) else cells[None]
        return self.call(tokens.known_of_kept, whole, kept)


def _needs(reduction: RelaxedReduction) -> frozenset[str]:
    """Return the names of the features that a reduction reads, apart from the tokens themselves.

    A relaxed reduction mixes all scores and similarities, so it needs more than its start would.
    """
    start = reduction.start
    names = {feature for score in start.scores for feature in SCORES[score].features}
    names |= {need for part in start.learned.scores for need in LEARNED[part].needs}
    names |= {SIMILARITIES[kind] for kind in start.similarity}
    if start.selector == "grid":
        names.add("grid")
    return frozenset(feature_name(name, start.observe) for name in names - {"tokens"})
