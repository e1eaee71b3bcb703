"""Search where to reduce, how many tokens to keep and how to treat the rest, by gradient.

The model is frozen; a few dozen numbers a site are trained on the relaxed graph under one-sided
constraints. The trajectory is then rounded to policies that meet every limit exactly; these, the
presets fitted to the same limits and small variations of the best are scored in *static* form, the
form that is deployed, and the best is returned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from deos_fx import presets
from deos_fx.budget import Budget
from deos_fx.cost import CostModel
from deos_fx.inputs import complete_inputs, prompt_layout
from deos_fx.operator.relaxed import RelaxedReduction
from deos_fx.passes.discretise import discretise, fit_counts, on_grid, within
from deos_fx.passes.find_sites import Site, Sites
from deos_fx.passes.insert_relaxed import insert_relaxed
from deos_fx.passes.lagrangian import AugmentedLagrangian
from deos_fx.passes.latency import LatencyTable, milliseconds
from deos_fx.passes.layout import PromptLayout
from deos_fx.passes.objective import Target, labelled, self_distilled
from deos_fx.passes.pipeline import Captured, capture_call, lower_call
from deos_fx.passes.search_state import SearchState
from deos_fx.passes.vary import variations
from deos_fx.policy import Policy
from deos_fx.reduction import Reduction, split_site
from deos_fx.search_result import Candidate, SearchResult
from deos_fx.signature import signature_of

__all__ = ["search"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the stage (``steps`` or ``scoring``), how much is done and how much there is."""

_GATE_TEMPERATURES = (0.5, 0.05)
_UPDATE_EVERY = 5
_CHECKPOINT_EVERY = 10
_SNAPSHOTS = 4
_VARIATIONS = 24
_LATENCY_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)


def search(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    *,
    budget: Budget,
    steps: int = 60,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the policy with the lowest task loss that meets a budget.

    Args:
        model: An unmodified transformers vision-language model.
        data: Model input dicts (batches), all with equally many images of one size per prompt.
            With ``labels`` the task is cross-entropy on them, otherwise the distance to the
            unreduced model's own predictions. From four batches on, a quarter is held back for
            scoring the rounded candidates.
        budget: At least one limit.
        steps: Gradient steps; one batch each.
        seed: Order of the batches.
        checkpoint: Folder to save the state of the steps in; a search that finds one there
            continues it, bit-identically.
        progress: Called as the search advances.

    Returns:
        The result; its policy meets every limit exactly.

    Raises:
        ValueError: If the data is empty or uneven, the budget cannot be met, or the checkpoint is
            of another search.
        TypeError: If an argument is of a wrong type.

    Interrupted by Ctrl-C, the steps end and the best policy so far is rounded and returned; press
    it again to abort.
    """
    if not isinstance(budget, Budget):
        raise TypeError(
            f"budget is a {type(budget).__name__}; give for example Budget(visual_tokens=0.125)."
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; give the number of gradient steps, at least 1.")
    problem = _Problem.of(model, data, budget.require())
    state = SearchState.start(
        {site.name: _start(site) for site in problem.sites.available()},
        AugmentedLagrangian(problem.limits),
        {"steps": steps, "seed": seed, "limits": problem.limits, **problem.fingerprint()},
    )
    if checkpoint is not None:
        state.resume(checkpoint)
    interrupted = _descend(problem, state, steps, seed, checkpoint, progress)
    return _choose(problem, state, interrupted, progress)


# *** the problem ***


@dataclass(frozen=True)
class _Batch:
    """One batch: explicit model inputs and what its logits are compared with."""

    inputs: dict[str, Any]
    target: Target


@dataclass(frozen=True)
class _Problem:
    """Everything that stays the same during a search."""

    model: PreTrainedModel
    captured: Captured
    layout: PromptLayout
    cost: CostModel
    latency: LatencyTable | None
    limits: dict[str, float]
    training: list[_Batch]
    scoring: list[_Batch]

    @classmethod
    def of(
        cls, model: PreTrainedModel, data: Iterable[Mapping[str, Any]], budget: Budget
    ) -> _Problem:
        signature_of(model)
        raw = [_checked(model, batch) for batch in data]
        if not raw:
            raise ValueError("data is empty: give at least one dict of model inputs.")
        layout = _common_layout(model, raw)
        text = max(batch["input_ids"].shape[1] for batch in raw)
        cost = CostModel(model, layout.images, text - layout.images * layout.tokens_per_image)
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

    def with_latency(self) -> _Problem:
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
        return torch.no_grad()(lambda: _run(graph, inputs))

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
        return _mean_loss(graph, self.scoring)


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


def _with_target(model: PreTrainedModel, captured: Captured, batch: Mapping[str, Any]) -> _Batch:
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    visual = inputs["input_ids"] == model.config.image_token_id
    if labels is not None:
        return _Batch(inputs, labelled(labels, visual))
    return _Batch(
        inputs, self_distilled(inputs, visual, lambda **given: _run(captured.graph_module, given))
    )


def _run(graph: fx.GraphModule, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [node.target for node in graph.graph.find_nodes(op="placeholder")]
    return graph(**{name: inputs[name] for name in names})


@torch.no_grad()
def _mean_loss(graph: fx.GraphModule, batches: Sequence[_Batch]) -> float:
    losses = []
    for batch in batches:
        output = _run(graph, batch.inputs)
        spaces = output.get("spaces")
        origin = spaces[-1]["origin"] if spaces else None
        losses.append(float(batch.target.loss(output["logits"], origin)))
    return sum(losses) / len(losses)


# *** the steps ***


def _start(site: Site) -> RelaxedReduction:
    """Where a site starts: half active, half kept, halfway between the regimes."""
    in_decoder = site.name != "projector"
    wanted = ("last_text_attention", "text_attention") if in_decoder else ("cls_attention",)
    scores = {name: 1.0 for name in (*wanted, "feature_norm", "novelty") if name in site.scores}
    start = Reduction(
        site.name,
        0.5,
        scores=scores,
        gain=0.5,
        temperature=0.1,
        mass_bias=0.5,
        similarity={"feature": 0.5} if in_decoder else {"feature": 0.5, "grid": 0.5},
    )
    return RelaxedReduction(start, activation=0.5, retention=0.5)


def _descend(
    problem: _Problem,
    state: SearchState,
    steps: int,
    seed: int,
    checkpoint: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> bool:
    """Take the gradient steps; returns whether they were interrupted."""
    captured = problem.captured.copy()
    graph = insert_relaxed(captured.graph_module, problem.sites, state.by_site(), problem.layout)
    try:
        while state.step < steps:
            _step(problem, state, graph, steps, seed)
            if progress is not None:
                progress("steps", state.step, steps)
            if checkpoint is not None and state.step % _CHECKPOINT_EVERY == 0:
                state.save(checkpoint)
    except KeyboardInterrupt:
        return True
    finally:
        if checkpoint is not None:
            state.save(checkpoint)
    return False


def _step(
    problem: _Problem, state: SearchState, graph: fx.GraphModule, steps: int, seed: int
) -> None:
    """One step: task loss and penalty of one batch, gradients of the policy parameters alone."""
    temperature = _gate_temperature(state.step, steps)
    reductions = state.by_site()
    for reduction in reductions.values():
        reduction.gate_temperature = temperature
    batch = problem.training[_batch_index(state.step, len(problem.training), seed)]
    task = batch.target.loss(_run(graph, batch.inputs)["logits"])
    costs = _relaxed_costs(problem, reductions)
    loss = task + state.lagrangian.penalty(costs)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    # Not backward(): the model's own parameters must not collect gradients.
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
    state.optimizer.step()
    if (state.step + 1) % _UPDATE_EVERY == 0:
        state.lagrangian.update(costs)
    state.history.append(
        {
            "step": state.step + 1,
            "task": task.item(),
            "gate_temperature": temperature,
            **{name: cost.item() for name, cost in costs.items()},
            **{f"multiplier_{k}": value for k, value in state.lagrangian.multipliers.items()},
            "keep": _keep_fractions(reductions),
        }
    )
    if state.step in _snapshot_steps(steps):
        state.take_snapshot()


def _gate_temperature(step: int, steps: int) -> float:
    """Cosine from soft to sharp gates."""
    soft, sharp = _GATE_TEMPERATURES
    return sharp + (soft - sharp) * (1 + math.cos(math.pi * step / steps)) / 2


def _batch_index(step: int, batches: int, seed: int) -> int:
    """Epochs in random order, a function of the step alone so that a resumed search agrees."""
    epoch, i = divmod(step, batches)
    generator = torch.Generator().manual_seed(seed + epoch)
    return int(torch.randperm(batches, generator=generator)[i])


def _snapshot_steps(steps: int) -> set[int]:
    """Steps of the second half whose parameters are rounded to candidates."""
    return {steps - round(i * steps / (2 * _SNAPSHOTS)) for i in range(_SNAPSHOTS)}


def _keep_fractions(reductions: Mapping[str, RelaxedReduction]) -> dict[str, float]:
    fraction: Tensor | float = 1.0
    fractions = {}
    for site, reduction in reductions.items():
        fraction = reduction.keep_fraction(fraction)
        fractions[site] = fraction.item()
    return fractions


def _relaxed_costs(
    problem: _Problem, reductions: Mapping[str, RelaxedReduction]
) -> dict[str, Tensor]:
    """Differentiable costs of one prompt, from the expected counts of every layer."""
    whole = float(problem.layout.images * problem.visual_tokens)
    layers = problem.cost.signature.decoder_layers
    counts: list[Tensor] = [torch.tensor(whole)] * layers
    overhead = torch.zeros(())
    present = torch.tensor(whole)
    for site, reduction in reductions.items():
        after = reduction.keep_fraction(present)
        share = problem.layout.images if site == "projector" else 1
        flops = problem.cost.reduction_flops(reduction.start, present / share, after / share)
        overhead = overhead + reduction.activation.sigmoid() * flops
        stage, layer = split_site(site)
        first = layer + 1 if stage == "decoder" else 0
        counts = counts[:first] + [after] * (layers - first)
        present = after
    costs = {
        "visual_tokens": problem.cost.visual_tokens(counts),
        "flops": problem.cost.flops(counts, overhead),
        "kv_cache": problem.cost.kv_bytes(counts),
    }
    if problem.latency is not None:
        costs["latency_ms"] = problem.latency.predict(counts)
    return {name: torch.as_tensor(cost) for name, cost in costs.items()}


# *** the choice ***


def _choose(
    problem: _Problem, state: SearchState, interrupted: bool, progress: Progress | None
) -> SearchResult:
    """Round, repair, score in static form, polish, and return the best."""
    proposals = [*_from_steps(problem, state), *_from_presets(problem)]
    if not proposals:
        raise ValueError(
            f"No policy meets the limits {problem.limits}: even one visual token at every site is "
            "too much. Raise the budget."
        )
    scoring = _Scoring(problem, len(proposals) + _VARIATIONS, progress)
    for source, policy in proposals:
        scoring.add(source, policy)
    try:
        _polish(problem, scoring)
    except KeyboardInterrupt:
        interrupted = True
    candidates = sorted(scoring.candidates, key=lambda candidate: candidate.loss)
    candidates = _in_time(problem, candidates)
    best = candidates[0]
    policy = replace(best.policy, name="searched", model=problem.cost.signature)
    candidates[0] = replace(best, policy=policy)
    return SearchResult(
        policy=policy,
        history=state.history,
        candidates=candidates,
        limits=problem.limits,
        unreduced=problem.cost.of_policy(Policy()),
        unreduced_loss=problem.static_loss(Policy()),
        relaxed_loss=_relaxed_loss(problem, policy),
        interrupted=interrupted,
    )


def _in_time(problem: _Problem, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates from the best whose own, measured, latency meets the limit."""
    limit = problem.limits.get("latency_ms", math.inf)
    while limit < math.inf and candidates:
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


def _from_steps(problem: _Problem, state: SearchState) -> list[tuple[str, Policy]]:
    """Rounded snapshots, each with all its sites and with only those that drop most."""
    if state.step not in state.snapshots:
        state.take_snapshot()
    proposals = []
    reductions = state.by_site()
    for step, parameters in state.snapshots.items():
        state.reductions.load_state_dict(parameters)
        for most_sites in (None, 3, 2, 1):
            rounded = discretise(reductions, problem.visual_tokens, most_sites)
            fitted = problem.fit(rounded)
            if fitted is not None and fitted not in [policy for _, policy in proposals]:
                proposals.append((f"step {step}", fitted))
    return proposals


def _from_presets(problem: _Problem) -> list[tuple[str, Policy]]:
    """The presets, fitted to the same limits: the search returns nothing worse than them."""
    proposals = []
    signature = problem.cost.signature
    share = problem.limits.get("visual_tokens", math.inf) / problem.layout.images
    tokens = min(share, signature.visual_tokens)
    for name in presets.names():
        try:
            policy = presets.fit(name, tokens, signature.decoder_layers, signature.visual_tokens)
        except ValueError:
            continue
        fitted = policy if problem.meets(policy) else problem.fit(policy)
        if fitted is not None:
            proposals.append((f"preset {name}", fitted))
    return proposals


def _polish(problem: _Problem, scoring: _Scoring) -> None:
    """Try single changes of the best candidate while they help."""
    left = _VARIATIONS
    signature = problem.cost.signature
    tried: set[str] = set()
    improved = True
    while improved and left:
        improved = False
        best = min(scoring.candidates, key=lambda candidate: candidate.loss)
        for policy in variations(best.policy, signature.decoder_layers, signature.visual_tokens):
            fitted = problem.fit(policy)
            if not left or fitted is None or fitted.to_json() in tried:
                continue
            tried.add(fitted.to_json())
            left -= 1
            origin = best.source.removeprefix("refined ")
            if scoring.add(f"refined {origin}", fitted) < best.loss:
                improved = True
                break


class _Scoring:
    """Scores policies in static form and reports progress."""

    def __init__(self, problem: _Problem, total: int, progress: Progress | None) -> None:
        self.problem = problem
        self.total = total
        self.progress = progress
        self.candidates: list[Candidate] = []

    def add(self, source: str, policy: Policy) -> float:
        loss = self.problem.static_loss(policy)
        cost = self.problem.cost.of_policy(policy)
        self.candidates.append(Candidate(policy, source, loss, cost))
        if self.progress is not None:
            self.progress("scoring", len(self.candidates), self.total)
        return loss


def _relaxed_loss(problem: _Problem, policy: Policy) -> float:
    """Task loss of a policy in its relaxed form, at the last gate temperature."""
    present = problem.visual_tokens
    reductions = {}
    for reduction, count in zip(
        policy.reductions, policy.counts(problem.visual_tokens), strict=True
    ):
        relaxed = RelaxedReduction.from_reduction(reduction, count / present)
        relaxed.gate_temperature = _GATE_TEMPERATURES[1]
        reductions[reduction.site] = relaxed
        present = count
    captured = problem.captured.copy()
    graph = insert_relaxed(captured.graph_module, problem.sites, reductions, problem.layout)
    return _mean_loss(graph, problem.scoring)
