"""Budgets: limits on the cost of the reduced model, all one-sided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from deos_fx.policy.latency import LatencyTable
from deos_fx.policy.shares import told_apart

__all__ = ["Budget", "check_budget"]

# More FLOPs or bytes than any machine has. Larger ints have no floating-point form.
_HIGHEST = 1e30


# The limits, by the names of their fields.
_LIMITS = ("visual_tokens", "flops", "kv_cache", "latency_ms")


class _Cost(Protocol):
    """The part of ``deos_fx.cost.model.Cost`` that a budget reads."""

    @property
    def visual_tokens(self) -> float: ...
    @property
    def flops(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much the reduced model may cost: any subset of limits, each an upper one.

    A float in (0, 1] is a fraction of the unreduced model (1.0 is all of it); an int is absolute.

    Attributes:
        visual_tokens: Mean over the decoder layers of the visual tokens a layer processes.
        flops: Floating-point operations of the prefill.
        kv_cache: Bytes of the key-value cache after the prefill.
        latency_ms: Milliseconds of the prefill of one prompt, always absolute.
        latency_table: What `deos_fx.profile` has measured on the machine that `latency_ms` is
            meant for. Without one, a search measures on the machine that it runs on.

    Raises:
        ValueError: On construction, if a limit is not a positive number of the kinds above, or
            there is a table and no limit.
        TypeError: On construction, if the table is something else.
    """

    visual_tokens: int | float | None = None
    flops: int | float | None = None
    kv_cache: int | float | None = None
    latency_ms: int | float | None = None
    latency_table: LatencyTable | None = None

    def __post_init__(self) -> None:
        for name in _LIMITS:
            value = getattr(self, name)
            if value is not None:
                _check_limit(name, value)
        if self.latency_table is None:
            return
        if not isinstance(self.latency_table, LatencyTable):
            raise TypeError(
                f"latency_table is a {type(self.latency_table).__name__}; give what "
                "deos_fx.profile returns, or LatencyTable.load(path)"
            )
        if self.latency_ms is None:
            raise ValueError("a latency_table limits nothing; give latency_ms as well")

    def __eq__(self, other: object) -> bool:
        # A share and a number are two amounts, though 1.0 == 1.
        if not isinstance(other, Budget):
            return NotImplemented
        return told_apart(self) == told_apart(other)

    def __hash__(self) -> int:
        return hash(told_apart(self))

    @property
    def is_empty(self) -> bool:
        """Return whether there is no limit at all."""
        return all(getattr(self, name) is None for name in _LIMITS)

    def require(self) -> Budget:
        """Return the budget itself.

        Raises:
            ValueError: If it has no limit.
        """
        if self.is_empty:
            raise ValueError(f"the budget has no limit; give at least one of {', '.join(_LIMITS)}")
        return self

    def limits(self, unreduced: _Cost) -> dict[str, float]:
        """Return the absolute limits by name of the field.

        Args:
            unreduced: Cost of the model without reductions.

        Raises:
            ValueError: If more visual tokens are allowed than the model has. Other limits may
                exceed the cost given here, since costs grow with the text and the batch; visual
                tokens do not, so such a limit must be a mistake in the unit.
        """
        # Latency has no entry: the cost model does not know it, so it is never a fraction.
        whole = {
            "visual_tokens": unreduced.visual_tokens,
            "flops": unreduced.flops,
            "kv_cache": unreduced.kv_bytes,
        }
        limits = {}
        for name, total in whole.items():
            value = getattr(self, name)
            if isinstance(value, float):
                # Case: a fraction of the unreduced model.
                limits[name] = value * total
            elif value is not None:
                # Case: an absolute limit.
                limits[name] = float(value)
        # Case: a limit that nothing could exceed, for example the tokens of all layers together.
        if limits.get("visual_tokens", 0) > unreduced.visual_tokens:
            raise ValueError(
                f"budget visual_tokens={self.visual_tokens}, but the model has only "
                f"{unreduced.visual_tokens:g}; give at most that, or a fraction in (0, 1]"
            )
        if self.latency_ms is not None:
            limits["latency_ms"] = float(self.latency_ms)
        return limits


def check_budget(budget: object) -> None:
    """Refuse anything but a budget.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(budget, Budget):
        raise TypeError(
            f"budget is a {type(budget).__name__}; give for example Budget(visual_tokens=0.125)."
        )


def _check_limit(name: str, value: object) -> None:
    kinds = "milliseconds" if name == "latency_ms" else "an int, or a fraction in (0, 1]"
    # Python counts True among the integers. The comparison also refuses NaN.
    fine = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < _HIGHEST
    if not fine:
        raise ValueError(
            f"budget {name}={value!r}; a limit is a positive number below {_HIGHEST:g}: {kinds}"
        )
    # Case: a number of tokens, FLOPs or bytes written as a float. Latency is never a fraction.
    if name != "latency_ms" and isinstance(value, float) and value > 1:
        raise ValueError(
            f"budget {name}={value!r}; a float is a fraction in (0, 1], for an absolute limit give "
            f"the int {math.floor(value)}"
        )
