"""Measure latency: the clock, and a table of what every decoder layer takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from deos_fx.policy.latency import LatencyTable

if TYPE_CHECKING:
    from deos_fx.cost.model import CostModel

__all__ = ["in_turns", "latency_table", "milliseconds"]

_WARM_UP = 2
_REPEATS = 7


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Measure the median wall-clock time of a call, after warming up.

    Args:
        call: The call to time.
        device: Where it runs; a GPU is synchronised before and after.

    Returns:
        Milliseconds.
    """
    return in_turns([call], device)[0]


def in_turns(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Measure calls that are to be compared: they take turns, so that all see the same machine.

    Args:
        calls: The calls to time.
        device: Where they run; a GPU is synchronised before and after each.

    Returns:
        Milliseconds of each: the median of its wall-clock times, after warming up.
    """
    times: list[list[float]] = [[] for _ in calls]
    for i in range(_WARM_UP + _REPEATS):
        for call, own in zip(calls, times, strict=True):
            # A GPU works on after a call returns, so wait for it on both ends.
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if i >= _WARM_UP:
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def latency_table(
    cost: CostModel, machine: str, prefills: Mapping[int, float], encoder: float
) -> LatencyTable:
    """Make a table from the times of whole prefills, in which all layers have the same length.

    What is not encoding is shared out among the decoder layers by their FLOPs.

    Args:
        cost: Costs of one of the prompts; only the text may differ.
        machine: What it ran on.
        prefills: Length of the prompt in every decoder layer -> milliseconds of its prefill.
        encoder: Milliseconds of encoding the images.
    """
    lengths = sorted(prefills)
    shares = {length: cost.shares(length) for length in lengths}
    layers = tuple(
        tuple(max(0.0, prefills[length] - encoder) * shares[length][i] for length in lengths)
        for i in range(cost.signature.decoder_layers)
    )
    return LatencyTable(
        model=cost.signature,
        machine=machine,
        lengths=tuple(lengths),
        layers=layers,
        encoder=encoder,
        encoder_flops=cost.encoding_flops(),
    )
