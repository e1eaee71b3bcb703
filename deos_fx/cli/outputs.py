"""Refuse to write over what is there, unless the user says so."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_target", "check_target_file"]

# Endings of files. A folder called model.onnx would surprise whoever expects one.
_FILES = {".csv", ".html", ".json", ".jsonl", ".onnx", ".png", ".safetensors", ".svg"}


def check_target(target: Path, force: bool, *sources: str | os.PathLike[str]) -> None:
    """Check that a command may write a folder.

    Args:
        target: What it would write.
        force: Whether the user allows files to be overwritten.
        *sources: Folders that the command reads, which are never written to.

    Raises:
        ValueError: If the target is one of the sources or a file, or a new name is one of a file,
            or it is not empty, and overwriting is not allowed.
    """
    for source in sources:
        # A hub id is no path, so it resolves to a folder that does not exist.
        if os.path.exists(source) and target.resolve() == Path(source).resolve():
            raise ValueError(
                f"{target} is the model's own folder, whose files would be replaced; give another "
                "folder to write"
            )
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, and a folder is written; give another name")
    if target.suffix.lower() in _FILES and not target.is_dir():
        raise ValueError(
            f"{target} would be a folder, with several files in it; give a name without "
            f"{target.suffix}"
        )
    if force or not target.is_dir():
        return
    # Hidden entries are temporary folders: of another process of this search, or of a killed one.
    if any(not entry.name.startswith(".") for entry in target.iterdir()):
        raise ValueError(
            f"{target} exists and is not empty; add --force to overwrite files in it, or give "
            "another folder"
        )


def check_target_file(target: Path, force: bool) -> None:
    """Check that a command may write a file, and that it can.

    Raises:
        OSError: If it cannot be written.
        ValueError: If it exists already, and overwriting is not allowed.
    """
    if target.is_file() and not force:
        raise ValueError(f"{target} exists; add --force to overwrite it, or give another file")
    from deos_fx.files import check_file

    check_file(target)
