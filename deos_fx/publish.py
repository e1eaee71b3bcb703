"""Move a finished folder to its place, so that what is there is whole at every instant.

Several files cannot be renamed in one step. So a folder of files that are one thing has a record
(`deos_fx.contents`): before the first file is replaced, the record is, by one that says that the
folder is incomplete, and the new record comes last.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from deos_fx.contents import INCOMPLETE, RECORD, files_in, matching
from deos_fx.scratch import one_at_a_time

__all__ = ["check_kind", "publish"]


def publish(new: Path, target: Path, removed: Sequence[str], scratch: Path) -> None:
    """Move the entries of a folder to another one.

    Args:
        new: The folder.
        target: The other one. If it does not exist, all is done in one step.
        removed: Patterns of files that go from `target` if they are not among the entries; read
            only if there is a record among them.
        scratch: A folder on the same disk, for what is replaced.

    Raises:
        OSError: If an entry cannot be replaced. If there is a record among the entries, `target` is
            what it was before.
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
            check_kind(target / path.relative_to(new), is_folder=path.is_dir())
        _merge(new, target, removed, scratch)


def _merge(new: Path, target: Path, removed: Sequence[str], scratch: Path) -> None:
    """Move the entries of a folder to one that exists; folders in it are merged as well."""
    if (new / RECORD).exists():
        stale = {entry.name for entry in matching(target, removed)}
        _replace_whole(new, target, stale, scratch)
        return
    for entry in sorted(new.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.exists():
            _merge(entry, place, (), scratch)
        else:
            os.replace(entry, place)


def _replace_whole(new: Path, target: Path, stale: set[str], scratch: Path) -> None:
    """Replace files that are one thing, or none of them.

    Args:
        new: The folder of the new files, one of them a record.
        target: The folder to move them to.
        stale: Files in `target` that go if they are not among the new ones.
        scratch: A folder on the same disk.
    """
    aside = Path(tempfile.mkdtemp(dir=scratch))
    record, old, marker = target / RECORD, aside / RECORD, aside / "marker"
    marker.write_text(json.dumps({"deos_fx": INCOMPLETE}), encoding="utf-8")
    marker.chmod((new / RECORD).stat().st_mode)
    if record.exists():
        # A copy, so that the folder is at no time without a record.
        shutil.copy2(record, old)
    # Where each file was, and where it is now.
    moved: list[tuple[Path, Path]] = []
    try:
        os.replace(marker, record)
        for name in sorted({*files_in(new)} | stale - {RECORD}):
            place = target / name
            if os.path.lexists(place):
                moved.append((place, aside / str(len(moved))))
                os.replace(*moved[-1])
            if (new / name).exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                moved.append((new / name, place))
                os.replace(*moved[-1])
        os.replace(new / RECORD, record)
    except BaseException:
        # Case: a file that is in use, or Ctrl-C. Everything goes back, and the old record last.
        for before, now in reversed(moved):
            with suppress(FileNotFoundError):
                os.replace(now, before)
        if old.exists():
            os.replace(old, record)
        else:
            record.unlink(missing_ok=True)
        raise


def check_kind(path: Path, is_folder: bool) -> None:
    """Refuse a folder, a device or a pipe in the place of a file, or a file in that of a folder.

    A link is judged by what it leads to, and one in the place of a file may lead anywhere but to a
    folder.

    Raises:
        OSError: If there is one.
    """
    is_link = path.is_symlink()
    try:
        # Looked at once: other writers may replace what is there between two looks.
        mode = path.stat().st_mode
    except OSError:
        # Case: nothing is there, or a link that leads nowhere.
        mode = None
    if is_folder and (is_link if mode is None else not S_ISDIR(mode)):
        raise NotADirectoryError(f"cannot write the folder {path}: it is a file. Move it away.")
    if is_folder or mode is None:
        return
    if S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write the file {path}: it is a folder. Move it away.")
    if not S_ISREG(mode) and not is_link:
        # Root could replace even /dev/null.
        raise OSError(f"cannot write the file {path}: it is a device or a pipe. Give another name.")
