"""What the command ``check`` does: compare the files of a folder with its record, and clean up."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deos_fx.contents import (
    EXPORT_FILES,
    GENAI_FILES,
    RECORD,
    files_in,
    is_recorded,
    problems,
    record_of,
    strangers,
)
from deos_fx.scratch import sweep

__all__ = ["check_contents", "remove_leftovers"]


def check_contents(folder: Path, console: Console) -> bool:
    """Compare all files of a reduced model or an export with its record, and print what is found.

    Args:
        folder: The folder.
        console: Where to print.

    Returns:
        Whether every file is as it was written, and none was added that would be read with them.

    Raises:
        ValueError: If the folder is incomplete, or has no record, a damaged one or one without
            hashes.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(
            f"{folder} has no {RECORD}; give a folder that deos-fx transform or export, or their "
            "functions in Python, have written"
        )
    record = record_of(folder)
    if not is_recorded(record):
        raise ValueError(
            f"{folder} cannot be checked: an earlier version has written it, without the hashes of "
            "its files. Save or export the model again."
        )
    found = problems(folder, record)
    table = Table(box=None)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("state", overflow="fold")
    for name, problem in found.items():
        state = Text(problem, "bold red") if problem else Text("ok", "green")
        table.add_row(Text(name), f"{record['files'][name]['bytes']:,}", state)
    read = strangers(folder, record, _read().get(record.get("deos_fx", ""), ()))
    for name in sorted({*files_in(folder), *read} - found.keys()):
        size = (folder / name).stat().st_size
        state = Text("not in the record", "dim")
        if name in read:
            state = Text("was not written with the others and would be read with them", "bold red")
        table.add_row(Text(name), f"{size:,}", state)
    console.print(table)
    return not any(found.values()) and not read


def _read() -> dict[str, tuple[str, ...]]:
    """Return the patterns of the files that are read of each kind of folder."""
    from deos_fx.exporters import genai_files, manifest
    from deos_fx.runtime import saved

    return {
        "reduced_model": saved.READ,
        manifest.FORMAT: EXPORT_FILES,
        genai_files.FORMAT: GENAI_FILES,
    }


def remove_leftovers(folder: Path, console: Console) -> None:
    """Remove what killed writers have left in a folder and beside it, and print what it was.

    Raises:
        ValueError: If there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    for place in (folder, folder.absolute().parent):
        for removed in sweep(place):
            console.print(f"Removed {removed}", highlight=False, markup=False)
