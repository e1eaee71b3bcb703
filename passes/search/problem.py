"""The problem of a search: the captured model, its data, limits and exact costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from deos_fx.cost.model import CostModel
from deos_fx.models.facts import facts_of
from deos_fx.models.sharded import check_sharding, gather_own, has_shards
from deos_fx.passes.analyse.check_reduction import check_reduction
from deos_fx.passes.analyse.sites import Site, Sites
from deos_fx.passes.captures import Captures
from deos_fx.passes.pipeline import Captured, lower_call
from deos_fx.passes.rewrite.split_prefix import split_prefix
from deos_fx.passes.search import processes
from deos_fx.passes.search.batches import (
    SearchBatch,
    checked_calls,
    moved,
    parted,
    with_targets,
    without_labels,
)
from deos_fx.passes.search.foreign import fingerprint
from deos_fx.passes.search.fronts import Fronts, Parts
from deos_fx.passes.search.objective import Effort
from deos_fx.passes.search.processes import Progress
from deos_fx.passes.search.timing import measured
from deos_fx.policy.budget import Budget
from deos_fx.policy.checks import check_halves
from deos_fx.policy.counts import fit_counts, on_grid, within
from deos_fx.policy.policy import Policy
from deos_fx.policy.site import split_site
from deos_fx.tokens.cache import SpaceFields
from deos_fx.tokens.layout import PromptLayout

__all__ = ["SearchProblem"]


@dataclass(frozen=True)
class SearchProblem:
    """Everything that stays the same during a search.

    Where images are of several sizes, ``layout``, ``cost`` and ``limits`` are those of the longest
    prompts. Policies then keep shares of each image, and have to meet every batch's own limits.

    Attributes:
        model: The unmodified model.
        captures: Its captured calls.
        captured: The captured call of the longest prompts.
        layout: The layout of these prompts.
        cost: Cost model of one of these prompts; it knows times if there is a limit on latency.
        others: Cost model of one prompt of every other layout, and its limits.
        limits: Name -> absolute limit.
        training: Batches for gradient steps.
        scoring: Batches for scoring candidates.
        interrupted: Whether answering or capturing was cut short; the batches are those that were
            ready.
        timed_here: Whether a limit on latency is one of this machine.
        names: Names of the sites that may be reduced; None for all.
        effort: What all searches on this problem have cost so far, in this process.
        fronts: What precedes the first reduction of graphs, once for every batch.
    """

    model: PreTrainedModel
    captures: Captures
    captured: Captured
    layout: PromptLayout
    cost: CostModel
    others: list[tuple[CostModel, dict[str, float]]]
    limits: dict[str, float]
    training: list[SearchBatch]
    scoring: list[SearchBatch]
    interrupted: bool = False
    timed_here: bool = False
    names: tuple[str, ...] | None = None
    effort: Effort = field(default_factory=Effort, compare=False)
    fronts: Fronts = field(default_factory=Fronts, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        data: Iterable[Mapping[str, Any]],
        budget: Budget,
        progress: Progress | None = None,
        recognise: Callable[[dict[str, Any]], None] | None = None,
        sites: Iterable[str] | None = None,
    ) -> SearchProblem:
        """Check the data, capture the model and set up the problem.

        Args:
            model: The unmodified model.
            data: Batches of model inputs, perhaps with labels.
            budget: The budget.
            progress: Called with the stages ``answers`` and ``capture`` after each batch.
            recognise: Called with the fingerprint of the problem, before anything is captured.
            sites: Names of the sites that may be reduced; left out, all.

        Returns:
            The problem. From four batches on, a quarter is held back for scoring.

        Raises:
            ValueError: If the data is empty or uneven, the model is not supported, or a site does
                not exist or cannot be reduced.
            TypeError: If the data holds anything but dicts, or the model is not one of
                transformers'.
        """
        # 1. The data: every batch is completed, and all of them fit one policy.
        check_sharding(model)
        gather_own(model)
        facts = facts_of(model)
        model.eval()
        calls, labels, early = checked_calls(facts, data, progress)
        # Of interrupted data, it is not known whose it is.
        if recognise is not None and not early:
            training = [without_labels(call) for call in parted(calls)[0]]
            recognise(fingerprint(facts.signature, training))
        # 2. Costs, for every layout. The longest prompts come first: their layout is the
        # problem's own.
        longest = sorted(calls, key=lambda call: call.inputs["input_ids"].shape[1])[::-1]
        costs: dict[PromptLayout, CostModel] = {}
        for call in longest:
            cost = CostModel.of_call(call)
            costs.setdefault(cost.layout, cost.of_one_prompt())
        # dict keeps the order, so the first is that of the longest prompts.
        cost, *others = costs.values()
        # 3. The captured calls, and a target for every batch.
        names = None if sites is None else tuple(map(str, sites))
        in_tower = any(name.startswith("vision.") for name in names or ())
        captures = Captures(model, in_tower)
        first = without_labels(longest[0])
        captured = captures.serving(replace(first, inputs=moved(first.inputs, model.device)))
        if names is not None:
            # Mistakes in them are found before the model answers.
            _sites_of(captured).limited_to(names)
        batches, interrupted = with_targets(captures, calls, labels, progress)
        # 4. The problem.
        for_steps, for_scoring = parted(batches)
        problem = cls(
            model=model,
            captures=captures,
            captured=captured,
            layout=cost.layout,
            cost=cost,
            others=[(other, {}) for other in others],
            limits={},
            training=for_steps,
            scoring=for_scoring,
            interrupted=early or interrupted,
            names=names,
        )
        return problem.under(budget)

    def under(self, budget: Budget) -> SearchProblem:
        """Return the same problem under another budget; captures, batches and effort are shared.

        Args:
            budget: The budget.

        Raises:
            ValueError: If it allows more visual tokens than the model has.
        """
        whole = Policy()
        problem = replace(
            self,
            others=[(other, budget.limits(other.predict(whole))) for other, _ in self.others],
            limits=budget.limits(self.cost.predict(whole)),
        )
        if budget.latency_ms is None:
            return problem
        # Measuring runs the model many times, so it is done once, and only if a limit asks for it.
        table = (
            budget.latency_table
            or self.cost.latency
            or measured(self.cost, self.captures, self.scoring)
        )
        return replace(
            problem,
            cost=self.cost.with_latency(table),
            others=[(other.with_latency(table), limits) for other, limits in problem.others],
            timed_here=budget.latency_table is None,
        )

    @property
    def visual_tokens(self) -> int:
        """Return V, the visual tokens of one image."""
        return self.layout.tokens_per_image

    @functools.cached_property
    def is_sharded(self) -> bool:
        """Return whether processes share the weights, and have to run layers together."""
        return has_shards(self.model)

    def fingerprint(self) -> dict[str, Any]:
        """Describe the problem, so that a checkpoint of another one is recognised."""
        return fingerprint(self.cost.signature, [batch.call for batch in self.training])

    @functools.cached_property
    def sites(self) -> Sites:
        """Return the sites of the model, of which those that are searched can be reduced."""
        sites = _sites_of(self.captured)
        return sites if self.names is None else sites.limited_to(self.names)

    def searched_sites(self) -> tuple[Site, ...]:
        """Return the sites to search, in order of depth: those given, or all after the tower."""
        usable = self.sites.available()
        if self.names is not None:
            return usable
        return tuple(site for site in usable if split_site(site.name)[0] != "vision")

    def amounts(self, policy: Policy, *, counted: bool = True) -> dict[str, float]:
        """Return the limited costs of a policy, under the names of the limits.

        Where images are of several sizes, each amount is that of the layout that uses the largest
        share of its own limit, scaled to ``limits``.

        Args:
            policy: The policy.
            counted: As for `CostModel.amounts`.

        Returns:
            Name -> amount.
        """
        # Costs of the longest prompts, as far as they are limited.
        amounts = self.cost.amounts(policy, self.limits, counted=counted)
        for other, own in self.others:
            for name, amount in other.amounts(policy, own, counted=counted).items():
                amounts[name] = max(amounts[name], amount / own[name] * self.limits[name])
        return amounts

    def fit(self, policy: Policy) -> Policy | None:
        """Return the policy with the largest counts that meet every limit; None if none do."""
        # By a formula first, which is right for nearly all policies; what is counted decides.
        for counted in (False, True):
            fitted = self._fitted(policy, counted)
            if fitted is not None and (counted or self.meets(fitted)):
                return fitted
        # Case: even the smallest counts break a limit.
        return None

    def _fitted(self, policy: Policy, counted: bool) -> Policy | None:
        """Return the policy with the largest counts that meet the limits, by what is counted."""
        fitted = fit_counts(
            policy,
            self.visual_tokens,
            lambda candidate: self.amounts(self.cost.for_any_size(candidate), counted=counted),
            self.limits,
        )
        if fitted is None:
            return None
        return self.cost.for_any_size(on_grid(fitted, *self.layout.grid))

    def runs(self, policy: Policy) -> bool:
        """Return whether the model can be reduced by a policy, for any images that it takes."""
        try:
            self.check(policy)
        except ValueError:
            # A search only wants to know whether.
            return False
        return True

    def check(self, policy: Policy) -> None:
        """Check that the model can be reduced by a policy, for any images that it takes.

        Args:
            policy: The policy.

        Raises:
            ValueError: If it cannot, with the reason.
        """
        by_grid = [step.site for step in policy.reductions if step.selector == "grid"]
        if by_grid and self.cost.sizes_vary:
            raise ValueError(
                f"{by_grid[0]}: selector 'grid' pools on the grid of one image, which does not fit "
                "images of other sizes; choose another selector"
            )
        for step in policy.reductions:
            check_reduction(self.captured.graph_module, self.sites, step, self.layout)
        # Tiers and halves have to share what is kept of the smallest image as well.
        for layout in (self.layout, *(cost.layout for cost, _ in self.others)):
            before: Sequence[int] = layout.sizes
            for step in policy.reductions:
                kept = [*map(step.count, layout.sizes)]
                apart = split_site(step.site)[0] != "decoder"
                for now, total in (
                    zip(before, kept, strict=True) if apart else [(sum(before), sum(kept))]
                ):
                    step.tier_counts(total)
                    check_halves(step, now, total)
                before = kept

    def checked_loss(self, policy: Policy) -> float:
        """Return the static loss of a policy, once it was checked; see `check`."""
        self.check(policy)
        return self.static_loss(policy)

    def meets(self, policy: Policy) -> bool:
        """Return whether a policy meets every limit as it is."""
        return within(self.amounts(policy), self.limits)

    def loss(self, parts: Parts, batch: SearchBatch) -> Tensor:
        """Return the task loss of a relaxed or static graph on one batch, 0-dim.

        Args:
            parts: The graph, split before its first reduction.
            batch: The batch.
        """
        gather_own(self.model)
        fields = self.fronts.run(parts, batch, batch.inputs, in_step=self.is_sharded)
        # Only a static graph has spaces. The last one has the tokens that logits are of.
        spaces: Sequence[SpaceFields] | None = fields.get("spaces")
        return batch.target.loss(fields["logits"], spaces[-1]["origin"] if spaces else None)

    def mean_loss(self, graph_for: Callable[[SearchBatch], fx.GraphModule]) -> float:
        """Return the mean task loss over the scoring batches; infinite if it is not a number.

        Args:
            graph_for: Makes the relaxed or static graph for a kind of batch, from a batch of it.
        """
        return self.scored(self._loss_of(graph_for))

    def _loss_of(
        self, graph_for: Callable[[SearchBatch], fx.GraphModule]
    ) -> Callable[[SearchBatch], Tensor]:
        """Return the loss of a graph that is made once for each kind of batch."""
        parts: dict[Hashable, Parts] = {}

        def loss(batch: SearchBatch) -> Tensor:
            if batch.kind not in parts:
                parts[batch.kind] = split_prefix(graph_for(batch))
            return self.loss(parts[batch.kind], batch)

        return loss

    def scored(self, loss: Callable[[SearchBatch], Tensor]) -> float:
        """Return the mean of a loss over the scoring batches, which all processes share out.

        A loss that is not a number is infinite, so that it is never the best.

        Args:
            loss: Returns the loss of a batch, 0-dim.
        """
        losses = self._each(loss)
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    @torch.no_grad()
    def _each(self, loss: Callable[[SearchBatch], Tensor]) -> list[float]:
        """Return a loss on each scoring batch; all processes share these out."""
        losses = torch.zeros(len(self.scoring), dtype=torch.float64)
        self.effort.forwards += len(self.scoring)
        losses = processes.computed(self.scoring, loss, losses, in_step=self.is_sharded)
        return losses.tolist()

    def static_losses(self, policy: Policy) -> list[float]:
        """Return the task loss of a policy's static graph on each scoring batch."""
        return self._each(self._loss_of(functools.partial(_lowered, policy)))

    def static_loss(self, policy: Policy) -> float:
        """Return the task loss of a policy's static graph, mean over the scoring batches."""
        return self.mean_loss(functools.partial(_lowered, policy))


def _sites_of(captured: Captured) -> Sites:
    assert captured.sites is not None
    return captured.sites


def _lowered(policy: Policy, batch: SearchBatch) -> fx.GraphModule:
    return lower_call(batch.captured.copy(), policy, batch.layout)
