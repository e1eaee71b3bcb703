"""The base of the schemas of files: what they have in common.

A schema is a file of its own in the room that reads the file, and `docs/schemas` has it as JSON
Schema. Only `deos_fx.reading` and these files need pydantic, and they are imported when a file is
read.
"""

from __future__ import annotations

from pathlib import PureWindowsPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from deos_fx.reading import CONTROLS, TEXT_LENGTH

__all__ = ["ENTRIES", "Count", "Hash", "Recorded", "Strict", "Text"]

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A whole number of something."""
Text = Annotated[str, Field(max_length=TEXT_LENGTH, pattern=f"^[^{CONTROLS}]*$")]
"""A name, or another short text."""
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256."""


class Strict(BaseModel):
    """An object with exactly the fields of a schema: nothing is converted, and NaN is no number."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _inside(name: str) -> str:
    # Both kinds of slashes and drives, whatever the system.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise ValueError("should be the name of a file inside of the folder")
    return name


class FileEntry(Strict):
    """A file of a folder."""

    bytes: Annotated[int, Field(ge=0, le=2**63 - 1)]
    sha256: Hash


Entries = dict[Annotated[Text, AfterValidator(_inside)], FileEntry]
"""Files of a folder by their names in it."""
ENTRIES = TypeAdapter(Entries)
"""Checks entries alone."""


class Recorded(Strict):
    """The record of a folder, which may be one that an earlier version has written."""

    files: Entries | None = None
    """All other files of the folder."""
    sha256: Hash | None = None
    """Of the record without this entry."""
