"""Measure latency: a table of prefill times by token count, on the machine that searches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LatencyTable", "in_turns", "milliseconds"]

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


@dataclass(frozen=True)
class LatencyTable:
    """Prefill times of one prompt with the same number of visual tokens in *all* decoder layers.

    A policy's time is predicted as a mean over the decoder layers: each contributes the time at its
    own count, interpolated linearly between measured counts. This only guides the search: the
    policy that it returns was timed itself.

    Attributes:
        counts: Visual tokens, ascending.
        times: Milliseconds at each count.
    """

    counts: tuple[int, ...]
    times: tuple[float, ...]

    @classmethod
    def measure(
        cls, counts: Sequence[int], run: Callable[[int], Callable[[], object]], device: torch.device
    ) -> LatencyTable:
        """Time a prefill at each count.

        Args:
            counts: Visual tokens to measure at.
            run: Returns a prefill with the given number of visual tokens in every decoder layer.
            device: Where it runs.
        """
        ordered = sorted(set(counts))
        return cls(tuple(ordered), tuple(milliseconds(run(count), device) for count in ordered))

    def predict(self, counts: Sequence[float | Tensor]) -> Tensor:
        """Predict milliseconds, 0-dim; differentiable in the counts.

        Args:
            counts: Visual tokens that each decoder layer processes.
        """
        x = torch.stack([torch.as_tensor(count, dtype=torch.float32) for count in counts])
        at, times = torch.tensor(self.counts).float(), torch.tensor(self.times)
        # The two measured counts around x; beyond the ends, the line of the outermost pair goes on.
        # The gradient comes from the slope alone.
        right = torch.searchsorted(at, x.detach()).clamp(1, len(at) - 1)
        left = right - 1
        slope = (times[right] - times[left]) / (at[right] - at[left])
        return (times[left] + slope * (x - at[left])).mean()
