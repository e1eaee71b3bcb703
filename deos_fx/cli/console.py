"""Where commands report what they do."""

from __future__ import annotations

from contextvars import ContextVar

from rich.console import Console

__all__ = ["QUIET", "report_console"]

QUIET: ContextVar[bool] = ContextVar("deos_fx_quiet", default=False)
"""Whether the option ``--quiet`` is given."""


def report_console() -> Console:
    """Return where a command reports what it does; nowhere with ``--quiet``."""
    return Console(quiet=QUIET.get())
