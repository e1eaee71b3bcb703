"""Let a graph take how many tokens stay, instead of having these counts as constants."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from deos_fx.operator.select import top_k
from deos_fx.passes.finish import finish
from deos_fx.policy.reduction import Reduction

__all__ = ["KEEP", "check_free", "free_counts"]

KEEP = "keep_"
"""The names of the inputs begin with it; the number of the reduction, from 1, follows."""


def check_free(reductions: Sequence[Reduction]) -> None:
    """Refuse reductions in which more depends on the count than how many tokens are picked.

    Raises:
        ValueError: If there is one.
    """
    for reduction in reductions:
        reasons = {
            f"the selector {reduction.selector!r}": reduction.selector != "top_k",
            "tiers": bool(reduction.tiers),
            "a residual token": reduction.has_rest,
            "a copy of the CLS token": reduction.keep_class,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"{reduction.site} has {reason}, so its count cannot be an input of a graph: "
                    "only the selector 'top_k' with one tier takes any. Leave elastic out."
                )


def free_counts(graph_module: fx.GraphModule, reductions: int) -> fx.GraphModule:
    """Replace the counts of a lowered prefill graph by inputs.

    A count is the length of an input: torch.export follows lengths wherever they lead, and values
    nowhere.

    Args:
        graph_module: A lowered prefill graph of reductions that `check_free` accepts. Changed in
            place: it gains the inputs ``keep_1``, ``keep_2``, ..., tensors [K] of any values.
        reductions: How many there are; images of one size make one choice for each.

    Returns:
        The same graph module.

    """
    graph = graph_module.graph
    picks = graph.find_nodes(op="call_function", target=top_k)
    assert len(picks) == reductions
    first = graph.find_nodes(op="placeholder")[0]
    for k, pick in enumerate(picks, start=1):
        with graph.inserting_before(first):
            given = graph.placeholder(f"{KEEP}{k}")
        with graph.inserting_before(pick):
            count = graph.call_method("size", (given, 0))
        pick.args = (*pick.args[:2], count)
    return finish(graph_module)
