"""Write results completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["fresh_folder", "write_file", "write_text"]


@contextmanager
def fresh_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide a temporary folder whose contents are moved to `target` only if nothing fails.

    Entries of `target` with the same names are replaced; its other entries stay.

    Args:
        target: The folder to write; it is created if it does not exist.

    Yields:
        A temporary folder on the same disk.

    Raises:
        OSError: If `target` is not a folder or cannot be written; raised on entry, before anything
            is written.
    """
    target = Path(target).absolute()
    # The nearest existing folder is on the disk of `target`, so results can be moved by renaming.
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    try:
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}-"))
    except OSError as error:
        raise type(error)(f"cannot write the folder {target}: {error.strerror or error}") from error
    try:
        yield temporary
        # Only now, when everything is written, does anything appear under the target.
        target.mkdir(parents=True, exist_ok=True)
        for entry in temporary.iterdir():
            _replace(entry, target / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file completely or not at all.

    Raises:
        OSError: If the folder does not exist or cannot be written.
    """
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file.
        write: Writes it under the temporary name that it is given.

    Raises:
        OSError: If the folder does not exist or cannot be written.
    """
    path = Path(path)
    # In the same folder, so that the last step is a rename, which cannot fail half-way.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        write(Path(temporary))
        # mkstemp makes files that only their owner can read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _replace(entry: Path, target: Path) -> None:
    # A folder cannot be replaced by renaming, unless it is empty.
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(entry, target)
