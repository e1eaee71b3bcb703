"""Search where to reduce, how many tokens to keep and how to treat the rest, by gradient.

The model is frozen. A few dozen numbers per site are trained on the relaxed graph under one-sided
constraints, starting near the best hand-designed policy that meets them. Snapshots of these steps
are then rounded to policies that meet every limit exactly. These, the presets and small variations
of the best are scored in *static* form, the form that is deployed, and the best is returned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import fx
from transformers import PreTrainedModel

from deos_fx.cost.latency import milliseconds
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.pipeline import run_graph
from deos_fx.passes.rewrite.straight_through import straight_through
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.problem import SearchBatch, SearchProblem, mean_loss
from deos_fx.passes.search.proposals import from_presets, from_steps, variations
from deos_fx.passes.search.space import keep_fractions, relaxed_costs, start_reductions
from deos_fx.passes.search.state import SearchState
from deos_fx.passes.verify import verify
from deos_fx.policy.budget import Budget, check_budget
from deos_fx.policy.policy import Policy
from deos_fx.results.search_result import Candidate, SearchResult

__all__ = ["relaxed_graph", "search"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage (``presets``, ``steps``, ...), the number done and the total."""

# Gate temperatures at the first and the last step, in standard deviations of the score. Wider gates
# let dropped tokens leak into the answer, and the search then learns to rely on the leak.
_GATE_TEMPERATURES = (0.2, 0.03)
# Steps between two updates of the multipliers, and between two checkpoints.
_UPDATE_EVERY = 5
_CHECKPOINT_EVERY = 10
# How many sets of parameters are rounded to candidates.
_SNAPSHOTS = 4
# Variations of the best preset before the steps, and of the best candidate after them.
_FIRST_VARIATIONS = 8
_VARIATIONS = 24


def search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    *,
    budget: Budget,
    sites: Sequence[str] | None = None,
    steps: int = 40,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the policy with the lowest task loss that meets a budget.

    Args:
        model: An unmodified transformers vision-language model.
        data: Model input dicts (batches), all with equally many images per prompt; the images of a
            batch are alike in size. Where the model has more visual tokens for larger images, the
            sizes may differ between batches, and the policy keeps shares of each image. With
            ``labels`` the task is cross-entropy on them, otherwise the distance to the unreduced
            model's own predictions. From four batches on, a quarter is held back for scoring the
            rounded candidates.
        budget: At least one limit.
        sites: Names of the sites to search, such as ``vision.11`` or ``decoder.2``; left out, the
            projector and all sites in the decoder.
        steps: Number of gradient steps; each takes one batch.
        seed: Seed of the order of the batches.
        checkpoint: Folder to save the state of the steps in. A search that finds a state there
            continues it, bit-identically.
        progress: Called as the search advances, with a stage, the number done and the total.

    Returns:
        The result; its policy meets every limit exactly.

    Raises:
        ValueError: If the data is empty or uneven, a site cannot be reduced, the budget cannot be
            met, or the checkpoint is of another search.
        TypeError: If an argument is of a wrong type.

    Ctrl-C during the steps ends them: their state is rounded, and the best policy so far is
    returned. Ctrl-C during the final variations ends only these. Elsewhere it aborts the search.
    """
    # Mistakes in the arguments are found before anything expensive.
    check_budget(budget)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; give the number of gradient steps, at least 1.")
    problem = SearchProblem.of(model, data, budget.require())
    searched = problem.searched_sites(sites)
    # 1. The best hand-designed policy that meets the limits is the start, if there is one.
    scoring = _Scoring(problem, progress)
    # Presets, fitted to the limits, and small changes of the best.
    scoring.add_all("presets", from_presets(problem))
    _polish(problem, scoring, "first variations", _FIRST_VARIATIONS)
    start = scoring.best.policy if scoring.candidates else Policy()
    # 2. The steps.
    state = SearchState.start(
        start_reductions(searched, start, problem.layout),
        AugmentedLagrangian(problem.limits),
        {
            "steps": steps,
            "seed": seed,
            "limits": problem.limits,
            "sites": [site.name for site in searched],
            **problem.fingerprint(),
        },
    )
    # A search that was stopped goes on with its parameters, optimizer, multipliers and history.
    if checkpoint is not None:
        state.resume(checkpoint)
    interrupted = _descend(problem, state, steps, seed, checkpoint, progress)
    # 3. Their snapshots, rounded, and variations of the best candidate.
    scoring.add_all("rounded policies", from_steps(problem, state))
    try:
        _polish(problem, scoring, "variations", _VARIATIONS)
    except KeyboardInterrupt:
        interrupted = True
    return _result(problem, state, scoring.candidates, interrupted)


# *** the steps ***


def _descend(
    problem: SearchProblem,
    state: SearchState,
    steps: int,
    seed: int,
    checkpoint: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> bool:
    """Take the gradient steps, and return whether they were interrupted."""
    graphs = {
        batch.kind: relaxed_graph(state.by_site(), batch)
        for batch in {batch.kind: batch for batch in problem.training}.values()
    }
    try:
        while state.step < steps:
            _step(problem, state, graphs, steps, seed)
            if progress is not None:
                progress("steps", state.step, steps)
            if checkpoint is not None and state.step % _CHECKPOINT_EVERY == 0:
                state.save(checkpoint)
    except KeyboardInterrupt:
        # The user wants a result now: whatever the steps have reached is rounded.
        return True
    finally:
        # Also after an interruption, so that a search can go on from where it was stopped.
        if checkpoint is not None:
            state.save(checkpoint)
    return False


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


def _step(
    problem: SearchProblem,
    state: SearchState,
    graphs: Mapping[Hashable, fx.GraphModule],
    steps: int,
    seed: int,
) -> None:
    """Take one step on the task loss of a batch and the penalty.

    Gradients are computed for the parameters of the reductions alone.
    """
    temperature = _gate_temperature(state.step, steps)
    reductions = state.by_site()
    for reduction in reductions.values():
        reduction.gate_temperature = temperature
    # 1. The task loss, through the relaxed graph.
    batch = problem.training[_batch_index(state.step, len(problem.training), seed)]
    task = batch.target.loss(run_graph(graphs[batch.kind], batch.call.inputs)["logits"])
    # 2. The costs, from expected counts alone: no graph is run for them.
    costs = relaxed_costs(reductions, problem.cost, problem.latency)
    loss = task + state.lagrangian.penalty(costs)
    # 3. Gradients and a step of the optimizer.
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    # Not backward(): the model's own parameters must not collect gradients. Some parameters may
    # have none, such as the diversity of a selector that ranks alone.
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
    state.optimizer.step()
    # 4. Multipliers and history. A step is counted when its record is in the history.
    if (state.step + 1) % _UPDATE_EVERY == 0:
        state.lagrangian.update(costs)
    state.history.append(
        {
            "step": state.step + 1,
            "task": task.item(),
            "gate_temperature": temperature,
            **{name: cost.item() for name, cost in costs.items()},
            **{f"multiplier_{k}": value for k, value in state.lagrangian.multipliers.items()},
            "keep": keep_fractions(reductions),
        }
    )
    if state.step in _snapshot_steps(steps):
        state.take_snapshot()


def _gate_temperature(step: int, steps: int) -> float:
    """Return the gate temperature of a step: a cosine from soft to sharp gates."""
    soft, sharp = _GATE_TEMPERATURES
    return sharp + (soft - sharp) * (1 + math.cos(math.pi * step / steps)) / 2


def _batch_index(step: int, batches: int, seed: int) -> int:
    """Return the batch of a step; every epoch has a random order.

    The order depends on seed and step alone, so a resumed search takes the same batches.
    """
    epoch, i = divmod(step, batches)
    generator = torch.Generator().manual_seed(seed + epoch)
    return int(torch.randperm(batches, generator=generator)[i])


def _snapshot_steps(steps: int) -> set[int]:
    """Return the steps after which parameters are rounded to candidates: all in the second half."""
    return {steps - round(i * steps / (2 * _SNAPSHOTS)) for i in range(_SNAPSHOTS)}


# *** the choice ***


def _result(
    problem: SearchProblem, state: SearchState, candidates: list[Candidate], interrupted: bool
) -> SearchResult:
    """Make the result: the best candidate, how it was found and its losses.

    Raises:
        ValueError: If no candidate meets the limits.
    """
    if not candidates:
        raise ValueError(
            f"No policy meets the limits {problem.limits}: even one visual token at every site is "
            "too much. Raise the budget."
        )
    # Sorting is stable: of equal losses, the earlier proposal wins.
    candidates = _in_time(problem, sorted(candidates, key=lambda candidate: candidate.loss))
    best = candidates[0]
    # The signature of the model lets the policy be refused by other models.
    policy = replace(best.policy, name="searched", model=problem.cost.signature)
    return SearchResult(
        policy=policy,
        history=state.history,
        candidates=[replace(best, policy=policy), *candidates[1:]],
        limits=problem.limits,
        unreduced=problem.cost.predict(Policy()),
        unreduced_loss=problem.static_loss(Policy()),
        relaxed_loss=_relaxed_loss(problem, policy),
        interrupted=interrupted,
    )


def _in_time(problem: SearchProblem, candidates: list[Candidate]) -> list[Candidate]:
    """Drop the best candidates until the measured latency of the first meets the limit.

    Raises:
        ValueError: If no candidate meets it.
    """
    limit = problem.limits.get("latency_ms", math.inf)
    while limit < math.inf and candidates:
        # Measuring takes long, so candidates are measured only until one is fast enough.
        time = milliseconds(problem.prefill(candidates[0].policy), problem.model.device)
        if time <= limit:
            break
        candidates = candidates[1:]
    if not candidates:
        raise ValueError(
            f"No policy was measured within {limit:g} ms per prefill on {problem.model.device}. "
            "Raise latency_ms."
        )
    return candidates


def _polish(problem: SearchProblem, scoring: _Scoring, stage: str, most: int) -> None:
    """Try single changes of the best candidate while they help, at most `most` in all."""
    # Attempts that are left.
    left = most
    improved = bool(scoring.candidates)
    while improved and left:
        improved = False
        best = scoring.best
        # However often a candidate was refined, its source names where it came from.
        origin = best.source.removeprefix("refined ")
        for policy in variations(best.policy, problem.sites, problem.visual_tokens):
            # A variation usually breaks a limit. Its counts are fitted to the limits again.
            fitted = problem.fit(policy) if problem.runs(policy) else None
            if fitted is None or scoring.has(fitted):
                continue
            # Only policies that are scored count.
            if not left:
                return
            left -= 1
            loss = scoring.add(f"refined {origin}", fitted)
            scoring.show(stage, most - left, most)
            if loss < best.loss:
                # Start again, with variations of the new best candidate.
                improved = True
                break


class _Scoring:
    """Scores policies in static form and collects them as candidates.

    Args:
        problem: The problem.
        progress: Called as proposals are scored.
    """

    def __init__(self, problem: SearchProblem, progress: Progress | None) -> None:
        self.problem = problem
        self.progress = progress
        self.candidates: list[Candidate] = []

    @property
    def best(self) -> Candidate:
        """Return the candidate with the lowest loss; there must be one."""
        return min(self.candidates, key=lambda candidate: candidate.loss)

    def has(self, policy: Policy) -> bool:
        """Return whether a policy with the same reductions is a candidate already."""
        return any(known.policy.reductions == policy.reductions for known in self.candidates)

    def add(self, source: str, policy: Policy) -> float:
        """Score a policy, add it to the candidates and return its loss."""
        loss = self.problem.static_loss(policy)
        cost = self.problem.cost.predict(policy)
        self.candidates.append(Candidate(policy, source, loss, cost))
        return loss

    def add_all(self, stage: str, proposals: Sequence[tuple[str, Policy]]) -> None:
        """Add all proposals that are not candidates yet."""
        for done, (source, policy) in enumerate(proposals, start=1):
            if not self.has(policy):
                self.add(source, policy)
            self.show(stage, done, len(proposals))

    def show(self, stage: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(stage, done, total)


def _relaxed_loss(problem: SearchProblem, policy: Policy) -> float:
    """Return the task loss of a policy in its relaxed form, at the last gate temperature."""
    # A relaxed reduction takes the share of the tokens that reach it.
    present = problem.visual_tokens
    # The same numbers as the policy, in the form that the steps were trained in.
    reductions = {}
    for reduction, count in zip(
        policy.reductions, policy.counts(problem.visual_tokens), strict=True
    ):
        relaxed = RelaxedReduction.from_reduction(reduction, count / present)
        relaxed.gate_temperature = _GATE_TEMPERATURES[1]
        reductions[reduction.site] = relaxed
        present = count
    return mean_loss(lambda batch: relaxed_graph(reductions, batch), problem.scoring)
