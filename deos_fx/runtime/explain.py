"""Explain the reductions of a batch of prompts: which tokens stayed and where the others went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx

from deos_fx.passes.notes import note_of, note_of_graph
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.site import split_site
from deos_fx.results.explanation import Explanation, SiteExplanation
from deos_fx.tokens.index import kept_of_prompt, take
from deos_fx.tokens.layout import PromptLayout

__all__ = ["explain"]


def explain(
    graph_module: fx.GraphModule, policy: Policy, layout: PromptLayout, inputs: Mapping[str, Any]
) -> Explanation:
    """Run a lowered prefill graph and explain its reductions.

    1. Run the graph with an interpreter that keeps what lowering marked.
    2. From the first reduction to the last, turn indices of incoming tokens into positions of the
       original prompt, and follow the masses.

    Args:
        graph_module: The graph, lowered for the policy and the layout.
        policy: The policy.
        layout: The prompts' layout.
        inputs: All inputs of the graph; a cache among them is filled.

    Returns:
        An explanation of each reduction, in order.
    """
    # 1. Run it.
    watching = _Watching(graph_module)
    names = [node.target for node in graph_module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        watching.run(*(inputs[name] for name in names))
    grids = layout.each_grid if layout.placed else layout.pictures
    if policy.is_empty:
        return Explanation([], [], grids)
    layout.tokens_per_image  # noqa: B018 - raises for images of several sizes
    # 2. Follow the tokens: `positions` and `mass` are those that come in at the next site.
    positions = watching.seen[""]["visual"]
    mass = torch.ones(positions.shape, device=positions.device)
    slots = _Slots(positions, inputs["input_ids"], layout)
    explanations = []
    for reduction in policy.reductions:
        seen = watching.seen[reduction.site]
        # Inside the decoder a row is a prompt; before it, a row is an image.
        images = 1 if split_site(reduction.site)[0] == "decoder" else layout.images
        # Values that lowering computed as constants are the same in all rows.
        for (site, role), constant in note_of_graph(graph_module).explains.items():
            if site == reduction.site:
                rows = images * len(positions)
                seen[role] = constant.to(positions.device).expand(rows, *constant.shape[1:])
        per_row = positions.unflatten(1, (images, -1)).flatten(0, 1)
        seen |= _destinations(reduction, seen, per_row)
        # From here on a row is a prompt.
        if images > 1:
            seen = _of_prompts(seen, images, positions.shape[1] // images)
        explanation = _explain_site(reduction, seen, positions, mass, slots)
        positions, mass = explanation.kept, explanation.mass
        explanations.append(_on_cpu(explanation))
    regimes = [reduction.regime for reduction in policy.reductions]
    return Explanation(explanations, regimes, grids)


class _Watching(fx.Interpreter):
    """An interpreter that keeps the values of the nodes that lowering marked."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.seen: dict[str, dict[str, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # A value that is known only when an encoder runs may not exist for this reduction.
        for site, role in note_of(n).explains if value is not None else ():
            self.seen.setdefault(site, {})[role] = value
        return value


class _Slots:
    """Track the prompt positions where visual tokens stand after each reduction.

    Tokens that are out of order take an image's first places, or its last ones if the prompt ends
    in an image.

    Args:
        visual: [B, V] positions of all placeholders.
        input_ids: [B, N].
        layout: The prompts' layout.
    """

    def __init__(self, visual: Tensor, input_ids: Tensor, layout: PromptLayout) -> None:
        text = torch.ones_like(input_ids).scatter(1, visual, 0).nonzero()[:, 1]
        self.text = text.reshape(len(input_ids), -1)
        self.placeholders = visual.unflatten(1, (layout.images, -1))
        self.ends = layout.ends
        self.now = visual
        self.in_order = True

    def after(self, reduction: Reduction, kept: Tensor, positions: Tensor) -> Tensor:
        """Return positions [B, M] of what is left of the prompt after a further reduction.

        Args:
            reduction: The reduction.
            kept: [B, K] indices of incoming tokens.
            positions: [B, K] the prompt positions that these came from.
        """
        self.in_order &= reduction.order == "position"
        # Once tokens are out of order, they stay so in all later reductions.
        # Case: inside the decoder, where kept tokens stay at their places.
        if split_site(reduction.site)[0] == "decoder":
            self.now = take(self.now, kept)
        # Case: before the decoder, in the order of the image.
        elif self.in_order:
            self.now = positions
        else:
            # Case: before the decoder, in another order than the image's.
            each = positions.shape[1] // self.placeholders.shape[1]
            taken = slice(-each, None) if self.ends else slice(each)
            self.now = self.placeholders[:, :, taken].flatten(1)
        return torch.cat([self.text, self.now], dim=1).sort(dim=1).values


def _of_prompts(seen: Mapping[str, Tensor], images: int, per_image: int) -> dict[str, Tensor]:
    """Combine values per image into values per prompt. Nothing moves between its images.

    Args:
        seen: Values by role, with a row for each image.
        images: Images per prompt.
        per_image: Tokens that come in, of one image.

    Returns:
        The same with a row for each prompt; indices count the incoming tokens of the prompt.
    """
    found = dict(seen)
    kept = seen["kept"]
    copies = kept.unflatten(0, (-1, images)).flatten(1) < 0
    found["kept"] = kept_of_prompt(kept, images, per_image).masked_fill(copies, -1)
    for role in ("score", "mass"):
        if role in seen:
            found[role] = seen[role].unflatten(0, (-1, images)).flatten(1)
    for role in ("destination", "moved"):
        if role in seen:
            # [rows, K, V] for each image become blocks on the diagonal of [B, images K, images V].
            of_images = seen[role].unflatten(0, (-1, images)).movedim(1, -1)
            found[role] = of_images.diag_embed(dim1=1, dim2=3).flatten(3, 4).flatten(1, 2)
    return found


def _destinations(
    reduction: Reduction, seen: Mapping[str, Tensor], tokens: Tensor
) -> dict[str, Tensor]:
    """Find where content and mass went: ``destination`` and ``moved``, each [rows, K, V].

    Args:
        reduction: The reduction.
        seen: Values by role.
        tokens: [rows, V]; only its shape is read.
    """
    if "assignment" not in seen:
        return {}
    receivers, sources = seen["receivers"], seen.get("sources")
    # With a residual token, the gain has been applied to the assignment already.
    moved = (1.0 if reduction.has_rest else reduction.gain) * seen["assignment"]
    # The assignment has a row for each receiver, which may be some of the kept tokens, in another
    # order: bring its rows into the order of the output.
    slots = (seen["kept"].unsqueeze(-1) == receivers.unsqueeze(1)).to(moved.dtype)
    moved = slots @ moved.expand(len(tokens), -1, -1)
    # Case: the assignment has columns for `sources` only; spread these over all incoming tokens.
    if sources is not None:
        places = torch.zeros((*moved.shape[:2], tokens.shape[1]), device=moved.device)
        index = sources.expand(len(tokens), -1).unsqueeze(1).expand(-1, moved.shape[1], -1)
        moved = places.scatter(2, index, moved)
    # Scores may weight the content, but not the mass.
    destination = moved * seen["weight"].unsqueeze(1) if "weight" in seen else moved
    return {"destination": destination, "moved": moved}


def _explain_site(
    reduction: Reduction,
    seen: Mapping[str, Tensor],
    positions: Tensor,
    mass: Tensor,
    slots: _Slots,
) -> SiteExplanation:
    """Explain one reduction.

    Args:
        reduction: The reduction.
        seen: Values by role; indices count incoming tokens.
        positions: [B, V] prompt positions of the incoming tokens.
        mass: [B, V] their masses.
        slots: Where the incoming tokens stand in the prompt; it is updated.
    """
    # A copy of CLS (-1) stands for itself alone and comes from no position of the prompt.
    kept = seen["kept"]
    copies = kept < 0
    after = take(mass, kept.clamp(min=0)).masked_fill(copies, 1.0)
    if "moved" in seen:
        # Computed here too, since the graph has masses only where something reads them.
        after = after + (seen["moved"] * mass.unsqueeze(1)).sum(dim=-1)
    gone = (kept.unsqueeze(-1) != torch.arange(positions.shape[1], device=kept.device)).all(dim=1)
    left = take(positions, kept.clamp(min=0)).masked_fill(copies, -1)
    return SiteExplanation(
        site=reduction.site,
        positions_in=positions,
        kept=left,
        dropped=positions[gone].reshape(len(positions), -1),
        destination=seen.get("destination"),
        mass=seen.get("mass", after),
        scores=seen.get("score"),
        remaining=slots.after(reduction, kept, left),
    )


def _on_cpu(explanation: SiteExplanation) -> SiteExplanation:
    values = {item.name: getattr(explanation, item.name) for item in fields(explanation)}
    moved: dict[str, Any] = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()
    }
    return SiteExplanation(**moved)
