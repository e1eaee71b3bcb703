"""Gradient steps on the parameters of relaxed reductions, and the best of what they reach.

The model is frozen. What comes before the first reduction depends on no parameter, so it is
computed once for every batch. A step then runs a short sequence: text, the tokens that stay, and
the runners-up, whose gates tell the gradient what would change if one of them stayed instead.
Parameters are judged by their *static* loss on held-back batches, the loss of what is deployed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from deos_fx.forms.parameters import logit
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.analyse.sites import Site
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.pipeline import run_graph
from deos_fx.passes.rewrite.split_prefix import split_prefix
from deos_fx.passes.rewrite.straight_through import straight_through
from deos_fx.passes.search import processes
from deos_fx.passes.search.batches import SearchBatch
from deos_fx.passes.search.fronts import Parts
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import discretise
from deos_fx.passes.search.space import keep_fractions, relaxed_costs
from deos_fx.passes.search.state import SearchState
from deos_fx.passes.verify import verify
from deos_fx.policy.reduction import Reduction

__all__ = ["GATE_TEMPERATURES", "Descent", "relaxed_graph", "site_tokens"]

GATE_TEMPERATURES = (0.5, 0.3)
"""Gate temperatures at the first and the last step, in standard deviations of the score."""
# Where the static loss is more than so many times that of the steps, gates leak: their temperature
# falls to this share.
_LEAK, _CLOSING = 1.5, 0.5
# Where it is below this share of theirs, tokens that are half there answer far worse than the
# choice alone, and steps would only make up for that. From then on, gates are hard, with a soft
# gradient.
_BLUR = 0.5
# Learning rates fall to this share by a cosine, after a warm-up of at most so many steps.
_FLOOR, _WARM_UP = 0.05, 20
# Steps between two updates of the multipliers.
_UPDATE_EVERY = 5
# Prompts of a step: smaller batches are averaged, because the loss of a few prompts is noise.
_PROMPTS = 16
# How often the static loss is measured: about so many times.
_SNAPSHOTS = 8
# Gradients of directions are clipped to this norm.
_CLIP = 1.0
# Steps in a row without a finite gradient, after which no more are taken.
_PATIENCE = 10


def relaxed_graph(reductions: Mapping[str, RelaxedReduction], batch: SearchBatch) -> fx.GraphModule:
    """Make the relaxed graph of a kind of batch; gradients pass its quantised layers.

    Args:
        reductions: Site name -> relaxed reduction.
        batch: A batch of the kind that the graph is for.

    Returns:
        The graph.
    """
    # A copy: the captured graph is used again, for other policies.
    captured = batch.captured.copy()
    assert captured.sites is not None
    graph_module = straight_through(captured.graph_module)
    graph_module = insert_relaxed(graph_module, captured.sites, reductions, batch.layout)
    return verify(graph_module, "relaxed")


def site_tokens(problem: SearchProblem, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the hidden states [B, V, d] of a batch's visual tokens at sites, by name."""
    seen: dict[str, Tensor] = {}

    def remember(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(
            lambda _, given: seen.update({name: given[0].detach()})
        )

    # Reductions that are not active leave all tokens as they are.
    plain: dict[str, Any] = {"keep": 1.0, "scores": {"feature_norm": 1.0}}
    reductions = {
        site.name: RelaxedReduction(Reduction(site.name, **plain), activation=0.0, retention=0.5)
        for site in sites
    }
    handles = [remember(name, module) for name, module in reductions.items()]
    batch = problem.training[0]
    try:
        with torch.no_grad():
            run_graph(relaxed_graph(reductions, batch), batch.inputs)
        problem.effort.forwards += 1
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass
class Descent:
    """The gradient steps of one search.

    Attributes:
        problem: The problem.
        state: Everything that changes from step to step.
        steps: Number of steps in all.
        seed: Seed of the order of the batches.
    """

    problem: SearchProblem
    state: SearchState
    steps: int
    seed: int

    def __post_init__(self) -> None:
        self.reductions = self.state.by_site()
        self._parts: dict[Hashable, Parts] = {}
        # Seconds of the latest step.
        self.seconds = 0.0

    def run(self, after_step: Callable[[int], None]) -> None:
        """Take the steps that are left.

        Args:
            after_step: Called with the number of steps taken.
        """
        if self.state.step == 0 and not self.state.best:
            # The start is judged as well: a search never returns what is worse.
            self.judge()
        while self.state.step < self.steps and not self._is_stuck():
            before = time.perf_counter()
            self.step()
            self.seconds = time.perf_counter() - before
            if self.state.step in self._snapshots():
                self.judge()
            after_step(self.state.step)
        lost = {i for record in self.state.history for i in record["not_finite"]}
        # Costs, too, can make gradients NaN: then no batch is to blame, and the steps end.
        if (lost or self._is_stuck()) and processes.is_main():
            self._warn_of(sorted(lost))

    def _warn_of(self, lost: Sequence[int]) -> None:
        """Warn of batches whose losses or gradients were not finite, or of limits."""
        if lost:
            where = f"the batches {lost} of data (from 0)"
            cure = "Leave these out, or load the model in float32 or bfloat16."
        else:
            # Case: the loss of every batch was finite, and the penalty was not.
            where = f"the costs under the limits {self.problem.limits}"
            cure = "Give other limits."
        if self._is_stuck():
            said = (
                f"The steps at {' and '.join(self.reductions)} end after {self.state.step} of "
                f"{self.steps}: {_PATIENCE} in a row had gradients that are NaN or infinite, in "
                f"{where}. {cure}"
            )
        else:
            # Case: other batches moved something. The words are the same for every place and round.
            said = (
                "Steps of the search moved nothing where gradients were NaN or infinite, in "
                f"{where}. {cure}"
            )
        warnings.warn(said, RuntimeWarning, stacklevel=3)

    def recount(self) -> None:
        """Count what was done before a search was ended and continued."""
        effort, steps = self.problem.effort, self.state.step * self._at_once
        # The start is judged, too.
        judged = sum("static" in record for record in self.state.history) + bool(self.state.best)
        effort.forwards += steps + judged * len(self.problem.scoring)
        effort.backwards += steps

    def _is_stuck(self) -> bool:
        """Return whether the latest steps have moved nothing."""
        latest = self._latest()
        return len(latest) == _PATIENCE and not any(record["finite"] for record in latest)

    def _latest(self) -> list[dict[str, Any]]:
        return self.state.history[-_PATIENCE:]

    def step(self) -> None:
        """Take one step on the task loss of some batches and the penalty."""
        progress = self.state.step / self.steps
        temperature, blurred = self._gates(progress)
        for reduction in self.reductions.values():
            reduction.gate_temperature = temperature
            if blurred:
                reduction.gates = "hard"
        self._set_rates(progress)
        # 1. The task loss and its gradients, a row for each batch; the costs from expected counts:
        # no graph is run for these.
        batches = self._batches()
        parameters = self.state.parameters
        rows = torch.zeros(len(batches), 1 + sum(each.numel() for each in parameters))
        self.problem.effort.forwards += len(batches)
        self.problem.effort.backwards += len(batches)
        rows = processes.computed(
            batches, self._loss_and_gradients, rows, in_step=self.problem.is_sharded
        )
        mean = rows.mean(dim=0)
        sums = [
            part.view_as(parameter).to(parameter)
            for part, parameter in zip(
                mean[1:].split([each.numel() for each in parameters]), parameters, strict=True
            )
        ]
        costs = relaxed_costs(self.reductions, self.problem.cost)
        _add_gradients(sums, self.state.lagrangian.penalty(costs), parameters)
        # 2. The step; a batch whose loss is not finite moves nothing.
        fine = rows.isfinite().all(dim=1).tolist()
        finite = all(fine) and all(gradient.isfinite().all() for gradient in sums)
        if finite:
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(self.state.directions, _CLIP)
            self.state.optimizer.step()
        # 3. Multipliers and history. A step is counted when its record is in the history.
        if (self.state.step + 1) % _UPDATE_EVERY == 0:
            self.state.lagrangian.update(costs)
        multipliers = self.state.lagrangian.multipliers
        self.state.history.append(
            {
                "step": self.state.step + 1,
                "task": mean[0].item(),
                "finite": finite,
                "not_finite": [
                    batch.number for batch, good in zip(batches, fine, strict=True) if not good
                ],
                "gate_temperature": temperature,
                **{name: cost.item() for name, cost in costs.items()},
                **{f"multiplier_{name}": value for name, value in multipliers.items()},
                "keep": keep_fractions(self.reductions),
            }
        )

    def judge(self) -> float:
        """Measure the static loss on the held-back batches, and keep the parameters if it is best.

        Returns:
            The loss.
        """
        with _as_static(self.reductions), self._within_limits():
            loss = self.held_back()
            # The parameters are kept with the counts that the loss was measured at.
            self.state.consider(loss)
        if self.state.history:
            self.state.history[-1]["static"] = loss
        return loss

    @contextmanager
    def _within_limits(self) -> Iterator[None]:
        """Let sites keep as many tokens as the limits allow, in the ratio of their steps."""
        whole = self.problem.visual_tokens
        policy = self.problem.fit(discretise(self.reductions, whole))
        before = {site: each.retention.item() for site, each in self.reductions.items()}
        if policy is not None:
            sites = [reduction.site for reduction in policy.reductions]
            kept = dict(zip(sites, policy.counts(whole), strict=True))
            present = whole
            for site, each in self.reductions.items():
                # A site that drops nearly nothing is left out.
                count = kept.get(site, present)
                each.retention.data.fill_(logit(count / present))
                present = count
        try:
            yield
        finally:
            for site, each in self.reductions.items():
                each.retention.data.fill_(before[site])

    def _gates(self, progress: float) -> tuple[float, bool]:
        """Return the temperature of the gates at the next step, and whether they blur too much.

        Both follow from the history, so a resumed search has the same.
        """
        temperature, since, blurred = _between(*GATE_TEMPERATURES, progress), list[float](), False
        for record in self.state.history:
            since.append(record["task"])
            if "static" in record:
                mean = sum(since) / len(since)
                leaks = record["static"] > _LEAK * mean
                blurred = blurred or record["static"] < _BLUR * mean
                temperature, since = temperature * (_CLOSING if leaks else 1.0), []
        return temperature, blurred

    def held_back(self) -> float:
        """Return the loss on the held-back batches, with gates as they are."""
        return self.problem.scored(self._loss)

    def _loss(self, batch: SearchBatch) -> Tensor:
        """Return the task loss of a batch at the present parameters."""
        if batch.kind not in self._parts:
            self._parts[batch.kind] = split_prefix(relaxed_graph(self.reductions, batch))
        return self.problem.loss(self._parts[batch.kind], batch)

    def _loss_and_gradients(self, batch: SearchBatch) -> Tensor:
        """Return the task loss of a batch and its gradients in one row."""
        gradients = [torch.zeros_like(parameter) for parameter in self.state.parameters]
        loss = self._loss(batch)
        _add_gradients(gradients, loss, self.state.parameters)
        values = [loss.detach(), *gradients]
        return torch.cat([value.flatten().float().cpu() for value in values])

    def _batches(self) -> list[SearchBatch]:
        """Return the batches of the next step; every epoch has a random order.

        The order depends on seed and step alone, so a resumed search takes the same batches.
        """
        training, at_once = self.problem.training, self._at_once
        chosen = []
        for place in range(self.state.step * at_once, (self.state.step + 1) * at_once):
            epoch, i = divmod(place, len(training))
            generator = torch.Generator().manual_seed(self.seed + epoch)
            chosen.append(training[int(torch.randperm(len(training), generator=generator)[i])])
        return chosen

    @property
    def _at_once(self) -> int:
        """Return the number of batches of a step."""
        training = self.problem.training
        prompts = len(training[0].call.inputs["input_ids"])
        return min(len(training), math.ceil(_PROMPTS / prompts))

    def _set_rates(self, progress: float) -> None:
        """Set the learning rates of the next step: a warm-up, then a cosine."""
        warm_up = min(1.0, (self.state.step + 1) / max(1, min(_WARM_UP, self.steps // 5)))
        share = warm_up * _between(1.0, _FLOOR, progress)
        for group in self.state.optimizer.param_groups:
            group["lr"] = share * group["full_rate"]

    def _snapshots(self) -> set[int]:
        """Return the steps after which the static loss is measured."""
        return {round((i + 1) * self.steps / _SNAPSHOTS) for i in range(_SNAPSHOTS)}


def _add_gradients(sums: Sequence[Tensor], loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradients of a loss; parameters that it does not depend on have none."""
    if not loss.requires_grad:
        return
    # Not backward(): the model's own parameters must not collect gradients.
    for total, gradient in zip(
        sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
    ):
        if gradient is not None:
            total += gradient


def _between(first: float, last: float, progress: float) -> float:
    """Return a value on a cosine from the first to the last."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


@contextmanager
def _as_static(reductions: Mapping[str, RelaxedReduction]) -> Iterator[None]:
    """Let reductions choose as their static form does: whole counts, and no runners-up."""
    before = {site: (each.runners_up, each.gates) for site, each in reductions.items()}
    try:
        for each in reductions.values():
            each.runners_up, each.gates = 0, "hard"
        yield
    finally:
        for site, each in reductions.items():
            each.runners_up, each.gates = before[site]
