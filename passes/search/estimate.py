"""How long a search will take, said when its first step is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from deos_fx.passes.search.processes import Progress

__all__ = ["Estimate"]

_T = TypeVar("_T")


@dataclass
class Estimate:
    """Measures what a search does most, and reports once how long it takes in all.

    Attributes:
        progress: Called with the stage ``estimate``, the seconds so far and those of the search.
        loss: Seconds of a static loss: of the fastest so far, because later ones share what the
            first ones compute.
        told: Whether it was reported.
        start: When the search began.
    """

    progress: Progress | None
    loss: float = math.inf
    told: bool = False
    start: float = field(default_factory=time.perf_counter)

    def of_loss(self, measure: Callable[[], _T]) -> _T:
        """Measure a static loss, and how long that takes."""
        before = time.perf_counter()
        found = measure()
        self.loss = min(self.loss, time.perf_counter() - before)
        return found

    def tell(self, step: float, steps: int, losses: int) -> None:
        """Report the estimate, unless that was done.

        Args:
            step: Seconds of a step.
            steps: Steps that are left.
            losses: Static losses that are left.
        """
        if self.told:
            return
        self.told = True
        if self.progress is not None:
            so_far = time.perf_counter() - self.start
            left = step * steps + (self.loss * losses if self.loss < math.inf else 0.0)
            self.progress("estimate", round(so_far), round(so_far + left))
