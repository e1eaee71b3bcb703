"""Where commands report what they do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar

from rich import console
from rich.segment import Segment

__all__ = ["QUIET", "Console", "report_console"]

QUIET: ContextVar[bool] = ContextVar("deos_fx_quiet", default=False)
"""Whether the option ``--quiet`` is given."""

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


def _picture(found: re.Match[str]) -> str:
    """Return a character as wide as a letter, Unicode's picture of the control if there is one."""
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def report_console() -> Console:
    """Return where a command reports what it does; nowhere with ``--quiet``."""
    return Console(quiet=QUIET.get())
