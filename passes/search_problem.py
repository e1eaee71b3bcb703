"""What a search works on: the captured model, its data, limits and exact costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from deos_fx.budget import Budget
from deos_fx.cost import CostModel
from deos_fx.inputs import complete_inputs, prompt_layout
from deos_fx.passes.discretise import fit_counts, on_grid, within
from deos_fx.passes.find_sites import Site, Sites
from deos_fx.passes.latency import LatencyTable
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.objective import Target, labelled, self_distilled
from deos_fx.passes.pipeline import Captured, capture_call, lower_call, run_graph
from deos_fx.policy import Policy
from deos_fx.reduction import Reduction, site_order, split_site
from deos_fx.signature import signature_of

__all__ = ["SearchBatch", "SearchProblem", "mean_loss"]

_LATENCY_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SearchBatch:
    """One batch: explicit model inputs and what its logits are compared with."""

    inputs: dict[str, Any]
    target: Target


@dataclass(frozen=True)
class SearchProblem:
    """Everything that stays the same during a search."""

    model: PreTrainedModel
    captured: Captured
    layout: PromptLayout
    cost: CostModel
    latency: LatencyTable | None
    limits: dict[str, float]
    training: list[SearchBatch]
    scoring: list[SearchBatch]

    @classmethod
    def of(
        cls, model: PreTrainedModel, data: Iterable[Mapping[str, Any]], budget: Budget
    ) -> SearchProblem:
        signature_of(model)
        raw = [_checked(model, batch) for batch in data]
        if not raw:
            raise ValueError("data is empty: give at least one dict of model inputs.")
        layout = _common_layout(model, raw)
        longest = max(raw, key=lambda batch: batch["input_ids"].shape[1])
        cost = CostModel.of_inputs(model, longest).of_one_prompt()
        limits = budget.limits(cost.of_policy(Policy()))
        example = {name: value for name, value in raw[0].items() if name != "labels"}
        captured = capture_call(model.eval(), example)
        batches = [_with_target(model, captured, batch) for batch in raw]
        held_back = len(batches) // 4
        problem = cls(
            model=model,
            captured=captured,
            layout=layout,
            cost=cost,
            latency=None,
            limits=limits,
            training=batches[: len(batches) - held_back],
            scoring=batches[len(batches) - held_back :] or batches,
        )
        return problem if budget.latency_ms is None else problem.with_latency()

    @property
    def visual_tokens(self) -> int:
        """V of one image."""
        return self.layout.tokens_per_image

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "model": str(signature_of(self.model)),
            "batches": [list(batch.inputs["input_ids"].shape) for batch in self.training],
            "tokens": [int(batch.inputs["input_ids"].sum()) for batch in self.training],
        }

    @property
    def sites(self) -> Sites:
        """Where the model can be reduced."""
        assert self.captured.sites is not None
        return self.captured.sites

    def searched_sites(self, names: Iterable[str] | None) -> tuple[Site, ...]:
        """The sites to search.

        Args:
            names: Their names; None for those behind the vision tower.

        Raises:
            ValueError: If one does not exist or cannot be reduced.
        """
        if names is not None:
            chosen = [self.sites.usable(name, ()) for name in names]
            return tuple(sorted(chosen, key=lambda site: site_order(site.name)))
        usable = self.sites.available()
        return tuple(site for site in usable if split_site(site.name)[0] != "vision")

    def with_latency(self) -> SearchProblem:
        """The problem with a latency table, measured by pruning at the projector."""
        counts = [max(1, round(self.visual_tokens * share)) for share in _LATENCY_SHARES]
        table = LatencyTable.measure(counts, self._timed_prefill, self.model.device)
        scaled = tuple(self.layout.images * count for count in table.counts)
        return replace(self, latency=replace(table, counts=scaled))

    def _timed_prefill(self, count: int) -> Callable[[], object]:
        prune = Reduction("projector", count, scores={"feature_norm": 1.0})
        return self.prefill(Policy((prune,)))

    def prefill(self, policy: Policy) -> Callable[[], object]:
        """The static prefill of one prompt, to be timed."""
        graph = lower_call(self.captured.copy(), policy, self.layout)
        rows = {"pixel_values": self.layout.images}
        inputs = {
            name: value[: rows.get(name, 1)] if isinstance(value, Tensor) else value
            for name, value in self.scoring[0].inputs.items()
        }
        return torch.no_grad()(lambda: run_graph(graph, inputs))

    def amounts(self, policy: Policy) -> dict[str, float]:
        """What a policy costs, under the names of the budget's limits."""
        cost = self.cost.of_policy(policy)
        amounts = {
            "visual_tokens": cost.visual_tokens,
            "flops": cost.flops,
            "kv_cache": cost.kv_bytes,
        }
        if self.latency is not None:
            amounts["latency_ms"] = self.latency.predict(cost.visual_tokens_per_layer).item()
        return amounts

    def fit(self, policy: Policy) -> Policy | None:
        """The policy with the largest counts that meet every limit, if any do."""
        fitted = fit_counts(policy, self.visual_tokens, self.amounts, self.limits)
        return None if fitted is None else on_grid(fitted, *self.layout.grid)

    def meets(self, policy: Policy) -> bool:
        """Whether it meets every limit as it is."""
        return within(self.amounts(policy), self.limits)

    def static_loss(self, policy: Policy) -> float:
        """Task loss of the static graph, mean over the scoring batches."""
        graph = lower_call(self.captured.copy(), policy, self.layout)
        return mean_loss(graph, self.scoring)


def _checked(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"data holds a {type(batch).__name__}; give dicts of model inputs, as a processor "
            "returns them."
        )
    given = {name: value for name, value in batch.items() if value is not None}
    moved = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    return complete_inputs(model, moved | {"use_cache": False})


def _common_layout(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> PromptLayout:
    """The layout of all batches, after checking that they agree."""
    layouts = [prompt_layout(model, batch) for batch in batches]
    sizes = sorted({tuple(batch["pixel_values"].shape[1:]) for batch in batches})
    if len(sizes) > 1:
        raise ValueError(
            f"The images of data vary in size: {', '.join(map(str, sizes))} (channels, height, "
            "width). Resize them to one size, as the model's processor does."
        )
    if len(set(layouts)) > 1:
        counts = sorted({layout.images for layout in layouts})
        raise ValueError(
            f"The prompts of data have {counts} images; search with equally many in every prompt."
        )
    structures = sorted({tuple(sorted(batch)) for batch in batches})
    if len(structures) > 1:
        raise ValueError(f"The batches of data have different inputs: {structures}.")
    return layouts[0]


def _with_target(
    model: PreTrainedModel, captured: Captured, batch: Mapping[str, Any]
) -> SearchBatch:
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    visual = inputs["input_ids"] == model.config.image_token_id
    if labels is not None:
        return SearchBatch(inputs, labelled(labels, visual))
    return SearchBatch(
        inputs,
        self_distilled(inputs, visual, lambda **given: run_graph(captured.graph_module, given)),
    )


@torch.no_grad()
def mean_loss(graph: fx.GraphModule, batches: Sequence[SearchBatch]) -> float:
    """Mean task loss of a relaxed or static graph over batches."""
    losses = []
    for batch in batches:
        output = run_graph(graph, batch.inputs)
        spaces = output.get("spaces")
        origin = spaces[-1]["origin"] if spaces else None
        losses.append(float(batch.target.loss(output["logits"], origin)))
    return sum(losses) / len(losses)
