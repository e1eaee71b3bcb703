"""PyTorch's FLOP counter, for the running thread alone."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]


class _NoModules:
    """Stand-in for the counter's module tracker, which hooks every module of the process."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *exception: object) -> None:
        """Undo nothing."""


def count_flops() -> FlopCounterMode:
    """Make a counter of all FLOPs while it is entered, without a table by module.

    By default the counter tracks the running module by hooks on all modules of the process. Threads
    that run another model would run these hooks too.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter
