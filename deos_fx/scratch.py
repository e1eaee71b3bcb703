"""Temporary folders of writers: locked while their writer lives, removed when it is dead."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["one_at_a_time", "scratch_folder", "sweep"]

# Names of the temporary folders, and of the file in each that its writer holds a lock on.
_PREFIX, _LOCK = ".deos-fx-", "lock"


@contextmanager
def scratch_folder(place: Path) -> Iterator[tuple[Path, int]]:
    """Provide a temporary folder; first remove those that dead writers have left in its place.

    Args:
        place: The folder to make it in.

    Yields:
        The folder, with the lock in it; and the mode that the umask gives to a new file here.

    Raises:
        OSError: If nothing can be written there.
    """
    sweep(place)
    folder, lock = _made(place)
    try:
        yield folder, stat.S_IMODE(os.fstat(lock).st_mode)
    finally:
        # Closed first, since Windows removes no file that is open.
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def sweep(place: Path) -> list[Path]:
    """Remove the temporary folders that dead writers have left in a folder.

    A writer is dead if nobody holds the lock, which the system takes from a process that ends in
    whatever way. Where the file system has no locks, nothing is removed.

    Returns:
        What was removed.
    """
    folders = [path for path in place.glob(f"{_PREFIX}*") if path.is_dir()]
    return [path for path in sorted(folders) if not path.is_symlink() and _removed(path)]


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other writer changes a folder, where the system can lock folders."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Case: a file system without locks on folders. Writers at the same time are found out on
        # loading, by the hashes.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _made(place: Path) -> tuple[Path, int]:
    """Make a temporary folder and take its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=place, prefix=_PREFIX))
        # Between these lines, `sweep` of another process may take the folder for a left one. Then
        # the lock is taken, or its file gone, and another folder is tried.
        with suppress(FileNotFoundError):
            lock = _open_lock(folder)
            if _locked(lock, unsupported=True) and _is_at(lock, folder / _LOCK):
                return folder, lock
            os.close(lock)


def _removed(folder: Path) -> bool:
    """Remove a temporary folder if its writer is dead, and return whether it was."""
    if sys.platform == "win32":
        # Windows removes no file that is open, so removing the lock tells whether it is held.
        try:
            os.unlink(folder / _LOCK)
        except OSError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True
    try:
        lock = _open_lock(folder)
    except OSError:
        # Case: removed by somebody else, or another user's.
        return False
    try:
        dead = _locked(lock, unsupported=False)
        if dead:
            # The lock is held until it is gone, so that no writer can begin here meanwhile.
            shutil.rmtree(folder, ignore_errors=True)
        return dead
    finally:
        os.close(lock)


def _open_lock(folder: Path) -> int:
    # A link in its place would lead to a file of somebody else.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.open(folder / _LOCK, flags, 0o666)


def _locked(lock: int, unsupported: bool) -> bool:
    """Try to take a lock, and return whether that worked.

    Args:
        lock: The open file.
        unsupported: What to return where the file system has no locks.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unsupported
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file still has its name."""
    return os.path.samestat(os.fstat(handle), os.stat(path))
