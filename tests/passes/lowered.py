"""Lowered graphs of the tiny LLaVA."""

from __future__ import annotations

from tiny import inputs, shared_llava
from torch import fx

from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel


def lowered(*reductions: Reduction, decode: bool = False) -> fx.GraphModule:
    model = shared_llava()
    reduced = ReducedModel(model, Policy(reductions))
    batch = inputs(model)
    if not decode:
        reduced(**batch)
        return reduced.graph_module
    reduced.generate(**batch, max_new_tokens=2)
    lowered = reduced.graphs._lowered_graphs.items()
    return next(graph for (_, layout), graph in lowered if layout is None)
