"""Several budgets in one search: in which order, and which policy is the best under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from deos_fx.passes.search.problem import SearchProblem
from deos_fx.policy.budget import Budget, check_budget
from deos_fx.policy.policy import Policy
from deos_fx.results.search_result import Candidate

__all__ = ["check_budgets", "in_words", "loosest_first", "pooled"]


def check_budgets(budgets: object) -> list[Budget]:
    """Return the budgets of a front.

    Raises:
        TypeError: If these are not several budgets.
        ValueError: If there is none, one has no limit, or two are equal.
    """
    if isinstance(budgets, Budget) or not isinstance(budgets, Sequence):
        raise TypeError(
            f"budgets is a {type(budgets).__name__}; give a list, for example "
            "[Budget(visual_tokens=0.25), Budget(visual_tokens=0.125)], or one budget as budget=."
        )
    for budget in budgets:
        check_budget(budget)
        budget.require()
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(
            f"budgets is {list(budgets)!r}; give at least one budget, and each budget once."
        )
    return list(budgets)


def loosest_first(problem: SearchProblem, budgets: Sequence[Budget]) -> list[Budget]:
    """Sort budgets by the smallest share of the unreduced costs that one of their limits allows."""

    def share(budget: Budget) -> float:
        under = problem.under(budget)
        whole = under.amounts(Policy())
        return min(limit / whole[name] for name, limit in under.limits.items())

    return sorted(budgets, key=share, reverse=True)


def in_words(budget: Budget) -> str:
    """Return the limits of a budget in a few words, which can name a folder."""
    given = ((item.name, getattr(budget, item.name)) for item in fields(budget))
    return ", ".join(f"{name}={value}" for name, value in given if value is not None)


def pooled(problem: SearchProblem, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of all searches that meet a problem's limits, each policy once.

    Of equal losses the cheaper policy comes first, so that it is not dominated by one that comes
    later.

    Args:
        problem: The problem, under the budget of one search.
        candidates: The candidates of all of them.
    """
    found: list[Candidate] = []
    for candidate in candidates:
        known = any(each.policy.reductions == candidate.policy.reductions for each in found)
        if not known and problem.meets(candidate.policy):
            found.append(candidate)
    return sorted(found, key=lambda each: (each.cost.flops, each.cost.kv_bytes, each.cost.in_units))
