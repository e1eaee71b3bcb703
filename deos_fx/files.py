"""Write results completely or not at all, at every instant.

Everything is written to a temporary folder on the same disk and then renamed. Several files cannot
be renamed in one step, so a folder of files that are one thing has a record (`deos_fx.contents`):
before the first file is replaced, the record is, by one that says that the folder is incomplete,
and the new record comes last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from deos_fx.contents import INCOMPLETE, RECORD
from deos_fx.scratch import one_at_a_time, scratch_folder, sweep

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_folder",
    "disk_errors",
    "fresh_folder",
    "matching",
    "write_file",
    "write_tensors",
    "write_text",
]


# *** folders ***


@contextmanager
def fresh_folder(
    target: str | os.PathLike[str], files: Sequence[str] = (), *, whole: bool = False
) -> Iterator[Path]:
    """Provide a temporary folder whose contents are moved to `target` only if nothing fails.

    If `target` does not exist, it appears in one step. Otherwise entries with the same names are
    replaced one by one, and its other entries stay. If the new files include a record, `target`
    says of itself that it is incomplete from the first of these steps to the last.

    Args:
        target: The folder to write; it is created if it does not exist. A link to a folder is
            followed. Links in the folder are replaced, and what they lead to stays.
        files: Patterns of the names of files that may be written.
        whole: Whether these files are one thing: those in `target` that are not written anew are
            removed.

    Yields:
        A temporary folder on the same disk; what is put beside it is removed in the end.

    Raises:
        OSError: If `target` is no folder, cannot be written, or has a folder where a file is to be
            written; raised on entry, before anything is written, where `files` tells.
    """
    target = Path(target).absolute()
    for path in matching(target, files):
        _check_kind(path, is_folder=False)
    with _room(_nearest(target), f"the folder {target}") as (scratch, mode):
        # What was left before `target` existed lies beside it.
        sweep(target.parent)
        new = scratch / "new"
        new.mkdir()
        yield new
        for path in filter(Path.is_file, new.rglob("*")):
            # safetensors and tempfile make files that only their owner can read.
            path.chmod(mode)
        _publish(new, target, files if whole else (), scratch / "marker")


def check_folder(target: str | os.PathLike[str]) -> None:
    """Check that a folder can be written, or made; nothing is left there.

    Raises:
        OSError: If it is no folder or cannot be written.
    """
    target = Path(target).absolute()
    with _room(_nearest(target), f"the folder {target}"):
        pass


def _nearest(target: Path) -> Path:
    """Return the nearest folder that exists; it is on the disk of the target."""
    for place in (target, *target.parents):
        if place.exists():
            return place
        if place.is_symlink():
            raise FileNotFoundError(f"cannot write the folder {target}: {_dangling(place)}")
    return place


def _dangling(link: Path) -> str:
    return f"{link} is a link to {os.readlink(link)}, which does not exist"


def _publish(new: Path, target: Path, removed: Sequence[str], marker: Path) -> None:
    """Move the entries of a folder to another one.

    Args:
        new: The folder.
        target: The other one.
        removed: Patterns of files that go from the other folder if they are not among the entries.
        marker: Where to write the record of an incomplete folder.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(new, target)
            return
        except OSError:
            # Case: somebody else has just made it. It gets the entries one by one.
            if not target.is_dir():
                raise
    with one_at_a_time(target):
        for path in new.rglob("*"):
            _check_kind(target / path.relative_to(new), is_folder=path.is_dir())
        _merge(new, target, removed, marker)


def _merge(new: Path, target: Path, removed: Sequence[str], marker: Path) -> None:
    """Move the entries of a folder one by one; folders in it are merged as well."""
    record = new / RECORD
    recorded = record.exists()
    if recorded:
        # From here on, the folder is incomplete.
        marker.write_text(json.dumps({"deos_fx": INCOMPLETE}) + "\n", encoding="utf-8")
        marker.chmod(record.stat().st_mode)
        os.replace(marker, target / RECORD)
    kept = {entry.name for entry in new.iterdir()}
    for name in sorted(kept - {RECORD}):
        if (new / name).is_dir() and (target / name).exists():
            _merge(new / name, target / name, (), marker)
        else:
            os.replace(new / name, target / name)
    for old in matching(target, removed):
        if old.name not in kept:
            old.unlink()
    if recorded:
        # From here on, it is whole.
        os.replace(record, target / RECORD)


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the entries of a folder with certain names; none if there is no folder."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return [e for e in entries if any(fnmatchcase(e.name, pattern) for pattern in patterns)]


def _check_kind(path: Path, is_folder: bool) -> None:
    """Refuse a folder in the place of a file, or a file in that of a folder."""
    if is_folder and os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"cannot write the folder {path}: it is a file. Move it away.")
    if not is_folder and path.is_dir():
        raise IsADirectoryError(f"cannot write the file {path}: it is a folder. Move it away.")


# *** files ***


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file completely or not at all; see `write_file`."""
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file completely or not at all; see `write_file`."""
    from safetensors.torch import save_file

    def write(part: Path) -> None:
        with disk_errors(path):
            save_file(dict(tensors), part)

    write_file(path, write)


def write_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file. If it is a link to a file, that file is written.
        write: Writes it under the temporary name that it is given.

    Raises:
        OSError: If the folder does not exist or cannot be written, or the file is a folder or a
            link that leads nowhere.
    """
    path = Path(path).absolute()
    _check_kind(path, is_folder=False)
    if path.is_symlink():
        if not path.exists():
            raise FileNotFoundError(f"cannot write the file {path}: {_dangling(path)}")
        path = path.resolve()
    with _room(path.parent, f"the file {path}") as (scratch, mode):
        part = scratch / path.name
        write(part)
        # safetensors makes files that only their owner can read.
        part.chmod(mode)
        os.replace(part, path)


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of safetensors while it writes into OSError: it fails because the disk does."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {os.fspath(path)}: {error}") from error


# *** both ***


@contextmanager
def _room(place: Path, target: str) -> Iterator[tuple[Path, int]]:
    """Provide a temporary folder for a target, and the mode of new files there.

    Args:
        place: The folder to make it in.
        target: What will be written, in words.
    """
    with ExitStack() as stack:
        try:
            found = stack.enter_context(scratch_folder(place))
        except OSError as error:
            raise type(error)(f"cannot write {target}: {error.strerror or error}") from error
        yield found
