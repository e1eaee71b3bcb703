"""The schema of the note that identifies a folder of a reduced model."""

from __future__ import annotations

from typing import Literal

from deos_fx.schema import Recorded, Text

__all__ = ["NoteFile"]


class NoteFile(Recorded):
    """What the folder of a reduced model holds, and the versions that wrote it."""

    deos_fx: Literal["reduced_model"]
    version: Literal[1]
    packages: dict[Text, Text]
