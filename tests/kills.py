"""Simulated kills: from some call on that changes files, every such call ends the writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# All calls that change a folder; those that write in a file change only hidden ones.
CALLS = ("chmod", "link", "mkdir", "remove", "rename", "replace", "rmdir", "symlink", "unlink")


class Killed(BaseException):
    """A kill. Unlike one, it runs what is to be cleaned up, but that cannot change files either."""


def kills(action: Callable[[], object]) -> Iterator[int]:
    """Run an action again and again, killed before its first change, its second, ..., its end.

    Args:
        action: What to run.

    Yields:
        The number of changes that it may make, after each run. The last run was not killed.
    """
    made, killed = 0, True
    while killed:
        with pytest.MonkeyPatch.context() as patch:
            left = [made]
            for name in CALLS:
                patch.setattr(os, name, _until(left, getattr(os, name)))
            try:
                action()
                killed = False
            except Killed:
                pass
        yield made
        made += 1


def _until(left: list[int], call: Callable[..., object]) -> Callable[..., object]:
    def patched(*args: object, **options: object) -> object:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return call(*args, **options)

    return patched


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder and in those in it that are not hidden."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: _flipped(data, 0),
    "ninth byte": lambda data: _flipped(data, 8),
    "byte at a quarter": lambda data: _flipped(data, len(data) // 4),
    "byte in the middle": lambda data: _flipped(data, len(data) // 2),
    "byte at three quarters": lambda data: _flipped(data, 3 * len(data) // 4),
    "last byte": lambda data: _flipped(data, len(data) - 1),
    "zeros": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"x",
    "nothing": lambda data: b"",
}
"""What may have happened to a file."""


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damaged(folder: Path) -> Iterator[str]:
    """Damage every file of a folder in every way, one at a time, and restore it afterwards.

    Yields:
        What is damaged, and how, while it is.
    """
    for name, data in contents(folder).items():
        path = folder / name
        for kind, damage in DAMAGES.items():
            path.write_bytes(damage(data))
            yield f"{name}: {kind}"
        path.unlink()
        yield f"{name}: missing"
        path.mkdir()
        yield f"{name}: a folder"
        path.rmdir()
        path.write_bytes(data)
