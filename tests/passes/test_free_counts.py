"""Lowered graphs whose counts are the lengths of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from closeness import assert_close

from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.passes.pipeline import copy_of, run_graph
from deos_fx.passes.rewrite.free_counts import check_free, free_counts
from deos_fx.policy.counts import with_counts
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier
from deos_fx.runtime.reduced_model import ReducedModel

POLICY = Policy((Reduction("vision.0", 40, gain=1, mass_bias=1), Reduction("decoder.0", 9)))


def test_a_graph_serves_any_count() -> None:
    model = tiny.shared_llava(3)
    batch = tiny.inputs(model, 2)
    call = completed(Call.of(facts_of(model), {**batch, "use_cache": False}))
    lowered = copy_of(ReducedModel(model, POLICY).graphs.prefill(call, call.layout))
    free = free_counts(lowered, len(POLICY.reductions))
    for counts in ((40, 9), (63, 62), (2, 1)):
        given = {f"keep_{k}": torch.zeros(count) for k, count in enumerate(counts, start=1)}
        right = ReducedModel(model, with_counts(POLICY, counts))(**batch).logits
        assert_close(run_graph(free, call.inputs | given)["logits"], right)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"selector": "greedy"}, "the selector 'greedy'"),
        ({"tiers": (Tier(keep=4),)}, "tiers"),
        ({"gain": 0.5, "residual": True}, "a residual token"),
        ({"gain": 1.0, "assignment": "window", "selector": "grid"}, "the selector 'grid'"),
        ({"keep_class": True, "order": "tier", "position": "compact"}, "a copy of the CLS token"),
    ],
)
def test_counts_on_which_more_depends_are_refused(options: dict[str, Any], reason: str) -> None:
    site = "vision.0"
    check_free([Reduction("projector", 9), Reduction("decoder.0", 9, gain=0.5)])
    for others in ([], [Reduction("decoder.0", 4)]):
        with pytest.raises(ValueError, match=f"^{site} has {reason}, so its count cannot be"):
            check_free([*others, Reduction(site, 9, **options)])
