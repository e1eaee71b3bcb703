"""Measure the memory that a call takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["peak_bytes"]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Measure what a call holds at most, above what was held before.

    Args:
        call: The call; call it once before, so that nothing is made for the first time.
        device: Where it runs. On a GPU, the allocator of torch counts; on the CPU, Linux counts the
            memory of the whole process, so that other threads should rest.

    Returns:
        Bytes; None where this cannot be measured, on a CPU without Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    # What the allocator holds goes back first, where it is that of glibc.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        # Linux forgets the peak of a process if asked to.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Case: a sandbox that hides it.
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Return a number of bytes from the status of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(field))
    return 1024 * int(line.split()[1])
