"""Write results completely or not at all: to a temporary folder on the same disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deos_fx.contents import matching
from deos_fx.publish import check_kind, publish
from deos_fx.scratch import scratch_folder, sweep

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_file",
    "check_folder",
    "disk_errors",
    "fresh_folder",
    "tensors_writer",
    "write_file",
    "write_files",
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
    says of itself that it is incomplete from the first of these steps to the last, and becomes what
    it was if one fails.

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
        check_kind(path, is_folder=False)
    with _room(_nearest(target), "folder", target) as (new, mode):
        # What was left before `target` existed lies beside it.
        sweep(target.parent)
        new.mkdir()
        yield new
        for path in filter(Path.is_file, new.rglob("*")):
            # safetensors and tempfile make files that only their owner can read.
            path.chmod(mode)
        publish(new, target, files if whole else (), new.parent)


def check_folder(target: str | os.PathLike[str]) -> None:
    """Check that a folder can be written, or made; nothing is left there.

    Raises:
        OSError: If it is no folder or cannot be written.
    """
    target = Path(target).absolute()
    with _room(_nearest(target), "folder", target):
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


# *** files ***


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file completely or not at all; see `write_file`."""
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file completely or not at all; see `write_file`."""
    write_file(path, tensors_writer(path, tensors))


def tensors_writer(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor]
) -> Callable[[Path], object]:
    """Return what writes tensors as a safetensors file, for `write_files`."""
    from safetensors.torch import save_file

    def write(part: Path) -> None:
        with disk_errors(path):
            save_file(dict(tensors), part)

    return write


def write_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file. If it is a link to a file, that file is written.
        write: Writes it under the temporary name that it is given.

    Raises:
        OSError: If the folder does not exist or cannot be written, or the file is a folder, a
            device or a pipe, or a link that leads nowhere.
    """
    write_files({Path(path): write})


def write_files(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files that go together: none of them is replaced before all are written.

    A kill between two of them leaves the first ones new.

    Args:
        files: Each file, and what writes it, in the order in which they are replaced; see
            `write_file`.

    Raises:
        OSError: If one cannot be written.
    """
    with ExitStack() as stack:
        moves = []
        for file, write in files.items():
            path = _followed(file)
            part, mode = stack.enter_context(_room(path.parent, "file", path))
            write(part)
            # safetensors makes files that only their owner can read.
            part.chmod(mode)
            moves.append((part, path))
        for part, path in moves:
            os.replace(part, path)


def check_file(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written; nothing is left there.

    Raises:
        OSError: As `write_file`.
    """
    path = _followed(path)
    with _room(path.parent, "file", path):
        pass


def _followed(path: str | os.PathLike[str]) -> Path:
    """Return the file that is written where a path is given, which may be a link."""
    path = Path(path).absolute()
    if path.is_symlink():
        if not path.exists():
            raise FileNotFoundError(f"cannot write the file {path}: {_dangling(path)}")
        path = path.resolve()
    check_kind(path, is_folder=False)
    return path


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
def _room(place: Path, kind: str, target: Path) -> Iterator[tuple[Path, int]]:
    """Provide a name in a temporary folder for what a target is to be, and the mode of new files.

    Args:
        place: The folder to make it in.
        kind: ``file`` or ``folder``.
        target: What will be written.
    """
    with ExitStack() as stack:
        try:
            scratch, mode = stack.enter_context(scratch_folder(place))
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"cannot write the {kind} {target}: {reason}") from error
        # Never the name of the lock, which lies there, too.
        part = scratch / f"new{target.suffix}"
        try:
            yield part, mode
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                # Case: a write has failed, which names no file.
                text = f"cannot write the {kind} {target}: {error.strerror}"
                raise type(error)(text) from error
            told = isinstance(error, OSError) or type(error) is ValueError
            if not told or str(part) not in str(error):
                raise
            # Nobody knows the temporary folder by its name.
            raise type(error)(str(error).replace(str(part), str(target))) from error
