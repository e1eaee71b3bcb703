"""PyTorch's FLOP counter, for the running thread alone."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]


class _NoModules:
    """Stands in for the counter's module tracker, whose hooks every module of the process runs."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *exception: object) -> None:
        """Leave nothing behind."""


def count_flops() -> FlopCounterMode:
    """Make a counter of all FLOPs while it is entered, without a table by module.

    By default the counter follows which module runs, by hooks on all modules of the process, into
    which threads that run another model would run.
    """
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    return counter
