"""Where commands report what they do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar

from rich import console
from rich.segment import Segment
from rich.table import Table

__all__ = ["COLUMNS", "QUIET", "Console", "report_console"]

QUIET: ContextVar[bool] = ContextVar("deos_fx_quiet", default=False)
"""Whether the option ``--quiet`` is given."""

COLUMNS = 80
"""Characters of a line that tables of figures are made for."""

# What a terminal would obey, but for tabs and ends of lines.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console(console.Console):
    """A console on which names of files, data and answers cannot command the terminal."""

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render an object, with a picture in the place of every character that is a command."""
        for segment in super().render(renderable, options):
            if segment.control or not _CONTROLS.search(segment.text):
                yield segment
            else:
                yield Segment(_CONTROLS.sub(_picture, segment.text), segment.style)

    def print_figures(self, table: Table) -> None:
        """Print a table that fits `COLUMNS`: on a narrower terminal it wraps, and loses nothing."""
        wide = self
        if self.width < COLUMNS:
            wide = Console(file=self.file, width=COLUMNS, quiet=self.quiet)
        wide.print(table)


def _picture(found: re.Match[str]) -> str:
    """Return a character as wide as a letter, Unicode's picture of the control if there is one."""
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def report_console() -> Console:
    """Return where a command reports what it does; nowhere with ``--quiet``."""
    return Console(quiet=QUIET.get())
