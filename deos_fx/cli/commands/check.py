"""The command ``deos-fx check``: whether the files of a folder are those that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deos_fx.cli.console import Console

__all__ = ["check"]


def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that transform or export wrote.")
    ],
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Remove what killed commands have left in it and beside it."),
    ] = False,
) -> None:
    """Compare every file of a reduced model or an export with its size and hash.

    Reads all files, which loading does only up to 1 GB. The exit code is 1 if
    a file is missing or another one. With --clean, also removes the hidden folders
    (.deos-fx-...) that killed commands have left in the folder and beside it.

    [bold]Examples[/]

      deos-fx check reduced

      deos-fx check onnx --clean
    """
    from deos_fx.cli.checking import check_contents, remove_leftovers
    from deos_fx.contents import RECORD

    console = Console(soft_wrap=True)
    if clean:
        remove_leftovers(folder, console)
        if not (folder / RECORD).exists():
            # Case: a folder that others were to be written in. There is nothing else to check.
            return
    if not check_contents(folder, console):
        raise typer.Exit(1)
