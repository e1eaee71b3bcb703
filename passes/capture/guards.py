"""Guards: check at every later run what the captured run has decided."""

from __future__ import annotations

from typing import Any

from torch import fx

from deos_fx.errors import GuardError

__all__ = ["check_guard"]


@fx.node.has_side_effect
def check_guard(value: Any, expected: Any) -> None:
    """Raise `GuardError` unless ``value`` is what the captured run saw.

    Args:
        value: Result of a recorded comparison or length.
        expected: Its value during capture.

    Raises:
        GuardError: If the two differ.
    """
    if value != expected:
        raise GuardError(f"captured for {expected!r}, called with {value!r}")
