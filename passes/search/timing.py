"""The latency of this machine, for searches that limit milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from deos_fx.cost.latency import in_turns, latency_table
from deos_fx.cost.model import CostModel
from deos_fx.inputs.call import Call
from deos_fx.models.encoding import encoded_by
from deos_fx.passes.captures import Captures
from deos_fx.passes.pipeline import lower_call, run_graph
from deos_fx.passes.search import processes
from deos_fx.passes.search.batches import SearchBatch, moved
from deos_fx.policy.latency import LatencyTable
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.tokens.layout import PromptLayout

__all__ = ["measured", "prefill"]

# Shares of an image's tokens at which latency is measured.
_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)


def measured(cost: CostModel, captures: Captures, batches: Sequence[SearchBatch]) -> LatencyTable:
    """Measure how long prefills of the longest prompts take, pruned at the projector.

    Args:
        cost: Cost model of one of the longest prompts.
        captures: The model's captured calls.
        batches: Batches of the data.

    Returns:
        The table; all processes have that of the main one.
    """
    counts = sorted({max(1, round(cost.tokens_per_image * share)) for share in _SHARES})
    prune = Reduction("projector", 1, scores={"feature_norm": 1.0})
    policies = [Policy((replace(prune, keep=count),)) for count in counts]
    calls = [prefill(captures, batches, policy) for policy in policies]
    device = captures.model.device
    times = in_turns([*calls, _encoding(batches)], device)
    # All processes plan with the times of one.
    *prefills, encoder = processes.of_main(times)
    lengths = [cost.text_tokens + cost.counts(policy)[0] for policy in policies]
    return latency_table(cost, str(device), dict(zip(lengths, prefills, strict=True)), encoder)


def prefill(
    captures: Captures, batches: Sequence[SearchBatch], policy: Policy
) -> Callable[[], object]:
    """Prepare the static prefill of one of the longest prompts, to be timed.

    Args:
        captures: The model's captured calls.
        batches: Batches of the data.
        policy: The policy to lower.

    Returns:
        A function that runs the prefill.
    """
    call, layout = _longest(batches)
    captured = captures.serving(call)
    graph = lower_call(captured.copy(), policy, layout)
    return torch.no_grad()(lambda: run_graph(graph, call.inputs))


def _encoding(batches: Sequence[SearchBatch]) -> Callable[[], object]:
    """Prepare the encoding of the images of one of the longest prompts, to be timed."""
    call, _ = _longest(batches)
    core = call.model.base_model
    return torch.no_grad()(lambda: [encoded_by(core, *one) for one in call.encodings])


def _longest(batches: Sequence[SearchBatch]) -> tuple[Call, PromptLayout]:
    """Return the call of one of the longest prompts, and its layout."""
    # Latency depends on the length of a prompt, and a limit must hold for all.
    longest = max(batches, key=lambda batch: batch.call.inputs["input_ids"].shape[1])
    call = longest.call.first_prompt()
    return replace(call, inputs=moved(call.inputs, call.model.device)), longest.layout
