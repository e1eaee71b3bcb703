"""Show how far a call of minutes has come: by a bar where there is a terminal, else in the log."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeAlias, TypeVar

from deos_fx.words import counted

__all__ = ["Progress", "shown", "shows_progress"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

Progress: TypeAlias = Callable[[str, int, int], Any]
"""Called with a stage, how much of it is done, and how much there is."""

_LOGGER = logging.getLogger("deos_fx")


def shows_progress(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function with an argument ``progress`` show its progress if none is given."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs.get("progress") is not None:
            return function(*args, **kwargs)
        with shown() as progress:
            kwargs["progress"] = progress
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def shown() -> Iterator[Progress]:
    """Show progress by a bar for each stage on a terminal; the bars are removed in the end.

    Elsewhere the logger ``deos_fx`` has a line at the end of each stage, at the level INFO. Of
    several processes, the main one shows its progress.

    Yields:
        What to call as the work advances. The stage ``estimate`` has seconds: those that were
        spent, and those that it will take in all.
    """
    if os.environ.get("RANK", "0") != "0":
        yield _nothing
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage == "estimate":
                bars.console.print(
                    f"about {counted(max(1, total - done), 'second')} more", style="dim"
                )
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def _log(stage: str, done: int, total: int) -> None:
    if stage == "estimate":
        _LOGGER.info("about %s more", counted(max(1, total - done), "second"))
    elif done == total:
        _LOGGER.info("%s: %d done", stage, done)


def _nothing(stage: str, done: int, total: int) -> None:
    """Report nothing."""
