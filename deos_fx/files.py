"""Writing results: everything or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["fresh_folder", "write_text"]


@contextmanager
def fresh_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write results in, which reach `target` only if nothing fails.

    Entries of `target` that the results also have are replaced, others stay.

    Args:
        target: The folder to write; it is made if it does not exist.

    Yields:
        A temporary folder on the same disk.

    Raises:
        OSError: If `target` is not a folder or cannot be written, before anything is done.
    """
    target = Path(target).absolute()
    place = next(folder for folder in (target, *target.parents) if folder.exists())
    try:
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}-"))
    except OSError as error:
        raise type(error)(f"cannot write the folder {target}: {error.strerror or error}") from error
    try:
        yield temporary
        target.mkdir(parents=True, exist_ok=True)
        for entry in temporary.iterdir():
            _replace(entry, target / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: If the folder does not exist or cannot be written.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _replace(entry: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(entry, target)
