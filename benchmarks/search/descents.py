"""Single descents with the switches that ablations turn and users do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deos_fx.passes.search.descent import Descent
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.proposals import discretise
from deos_fx.passes.search.run import SearchRun
from deos_fx.passes.search.search import default_steps
from deos_fx.passes.search.space import relaxed
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction

__all__ = ["PARTS", "Reached", "descend", "places", "with_parts"]

RUNNERS_UP = 24
"""Tokens that stay beside the kept ones, as in a search."""
PARTS = ("probe", "quadratic", "text", "place", "metric")
"""The learned parts, in the order of the ablation."""
# Rank of the learned quadratic form and of the learned likeness to the text, and waves of a place.
_RANK, _WAVES = 8, 4


@dataclass(frozen=True)
class Reached:
    """What a descent has reached.

    Attributes:
        policy: The best policy, fitted to the limits.
        loss: Its static loss on held-back data.
        history: A dict for each step.
    """

    policy: Policy
    loss: float
    history: list[dict[str, Any]]


def places(problem: SearchProblem) -> list[Policy]:
    """Return where a search would start, the projector alone first."""
    run = SearchRun(problem, 1, 0, None, None)
    return run.places(problem.searched_sites())


def descend(
    problem: SearchProblem,
    start: Policy,
    seed: int,
    *,
    steps: int | None = None,
    trained: Callable[[str], bool] | None = None,
    two_sided: bool = False,
    after_step: Callable[[Descent], None] = lambda _: None,
    **settings: Any,
) -> Reached:
    """Take gradient steps from a policy.

    Args:
        problem: The problem.
        start: Where to start.
        seed: Seed of the order of the batches.
        steps: Their number; as many as a search takes, if left out.
        trained: Says of a parameter, by the last parts of its name, whether it may be trained.
        two_sided: Whether limits are to be met from both sides.
        after_step: Called with the descent after each step.
        **settings: See `RelaxedReduction`.
    """
    torch.manual_seed(seed)
    steps = steps or default_steps(problem)
    reductions = relaxed(start, problem.visual_tokens, runners_up=RUNNERS_UP, **settings)
    if trained is not None:
        for reduction in reductions.values():
            for name, parameter in reduction.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and trained(name))
    lagrangian = AugmentedLagrangian(problem.limits, two_sided=two_sided)
    state = SearchState.start(reductions, lagrangian, {})
    descent = Descent(problem, state, steps, seed)
    descent.run(lambda _: after_step(descent))
    state.take_best()
    policy = discretise(descent.reductions, problem.visual_tokens)
    policy = problem.fit(policy) or policy
    return Reached(policy, problem.static_loss(policy), state.history)


def with_parts(start: Policy, parts: Iterable[str], seed: int) -> Policy:
    """Give the first reduction of a policy these learned parts, without an effect yet.

    Only ``metric`` has one: it compares the principal directions of the tokens beside the whole
    tokens, as a search starts with.
    """
    first, *others = start.reductions
    chosen = {name: _untrained(name, first, seed) for name in parts}
    kinds = first.similarity if "metric" in chosen else {"feature": 1.0}
    changed = replace(first, learned=Learned(chosen), similarity=kinds)
    return Policy((changed, *others))


def _untrained(name: str, reduction: Reduction, seed: int) -> Tensor:
    """Return a learned part that adds nothing, but has a gradient."""
    if name in ("probe", "metric"):
        # As the search makes them.
        return reduction.learned[name]
    width = len(reduction.learned["probe"])
    if name == "place":
        return torch.zeros(_WAVES, _WAVES)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(width, _RANK, generator=generator) * width**-0.5
    if name == "quadratic":
        # What is added and what is taken away are the same at first.
        return torch.cat([directions, directions], dim=1)
    # Case: text. The embeddings of the text are as wide as the tokens in front of the decoder.
    return torch.cat([directions, torch.zeros(width, _RANK)])
