"""What a folder holds: size and SHA-256 of every file, in a record that is checked on loading.

The record is ``deos_fx.json``. Besides what a kind of folder has to say, it has two entries: for
each file of the folder its size in bytes and its SHA-256 (``files``), and a SHA-256 of the record
itself without that entry (``sha256``).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from deos_fx.words import counted

__all__ = [
    "EXPORT_FILES",
    "FILES",
    "GENAI_FILES",
    "HASHED_BYTES",
    "INCOMPLETE",
    "MODEL_FILES",
    "RECORD",
    "add_to_record",
    "check_unchanged",
    "file_hash",
    "files_in",
    "is_recorded",
    "matching",
    "own_hash",
    "problems",
    "record_of",
    "recorded",
    "stamp",
    "strangers",
    "verify",
    "write_record",
]

RECORD = "deos_fx.json"

INCOMPLETE = "incomplete"
"""What a record says of a folder while its files are replaced (its entry ``deos_fx``)."""

HASHED_BYTES = 1_000_000_000
"""How much is read to check hashes on loading, from the smallest file on; sizes always are."""


# *** kinds of folders ***

_SHARED = (RECORD, "policy.json", "policy.safetensors", "config.json", "generation_config.json")
_GRAPHS = (*_SHARED, "weights.data", "images.safetensors")
_NUMBER = "[0-9]" * 5

MODEL_FILES = (
    *_SHARED,
    "model.safetensors",
    "model.safetensors.index.json",
    f"model-{_NUMBER}-of-{_NUMBER}.safetensors",
)
"""Patterns of the files that a reduced model consists of; not every one has all of them."""

EXPORT_FILES = (*_GRAPHS, "prefill.onnx", "decode.onnx", "extend.onnx", "image_encoder.onnx")
"""The files of an export for ONNX Runtime."""

GENAI_FILES = (*_GRAPHS, "genai_config.json", "vision.onnx", "embedding.onnx", "decoder.onnx")
"""The files of an export for onnxruntime-genai."""

# A folder is one of these. Whichever is written, the files of the others go as well, since another
# loader would read them: transformers prefers a single file of weights to several.
FILES = tuple(dict.fromkeys((*MODEL_FILES, *EXPORT_FILES, *GENAI_FILES)))
"""The files of all kinds."""


# *** writing ***


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the record of everything in a folder; nobody else may be writing or reading there.

    Args:
        folder: The folder.
        facts: What else the record says.
    """
    _write(folder, {**facts, "files": {}})


def add_to_record(folder: Path) -> None:
    """Add the files that a folder got after its record was written; see `write_record`."""
    _write(folder, record_of(folder))


def _write(folder: Path, record: dict[str, Any]) -> None:
    """Write a record with all files in the folder; hashes that it has already are kept."""
    known = record["files"]
    record["files"] = {
        name: known.get(name) or _described(folder / name) for name in files_in(folder)
    }
    record["sha256"] = own_hash(record)
    # No line end at the end: without its last byte, the record is no JSON any more.
    (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def files_in(folder: Path) -> list[str]:
    """Return the files of a folder and of those in it, without its record."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted({*files} - {RECORD})


def recorded(folder: Path) -> list[str]:
    """Return the patterns of the files that the record of a folder names; none without a record.

    What it names has been written with it, so it goes when the folder is written anew.
    """
    try:
        names = record_of(folder).get("files", {})
    except (OSError, ValueError):
        return []
    return [escape(name) for name in names]


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the entries of a folder with certain names; none if there is no folder."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return [e for e in entries if any(fnmatchcase(e.name, pattern) for pattern in patterns)]


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


# *** reading ***


def record_of(folder: Path) -> dict[str, Any]:
    """Read the record of a folder.

    Raises:
        FileNotFoundError: If it has none.
        ValueError: If the record is damaged, or says that the folder is incomplete.
    """
    # Loaded here: the help of the command line needs no torch.
    from deos_fx.reading import read_json

    path = folder / RECORD
    try:
        record = read_json(path)
        if not isinstance(record, dict):
            raise ValueError("it is no object with named entries")
        if is_recorded(record) and not _is_sound(record):
            raise ValueError("its entries are not those that were written")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {_CURE}") from error
    if record.get("deos_fx") == INCOMPLETE:
        raise ValueError(
            f"{folder} is incomplete: what replaced its files was stopped half-way, so some of "
            f"them are old and some new. {_CURE}"
        )
    return record


_CURE = "Save or export the model again, or restore the folder from a copy."


def is_recorded(record: Mapping[str, Any]) -> bool:
    """Return whether a record has hashes; earlier versions of this package wrote none."""
    return "files" in record or "sha256" in record


def verify(folder: Path, record: Mapping[str, Any], read: Sequence[str] = ()) -> None:
    """Refuse a folder whose files are not those of its record.

    Args:
        folder: The folder.
        record: Its record, as `record_of` returns it.
        read: Patterns of the names of files that a reader would take for a part of it.

    Raises:
        ValueError: If a file is missing or is another one, or one that would be read is not in the
            record.

    Warns:
        UserWarning: If the record has no hashes.
    """
    if not is_recorded(record):
        warnings.warn(
            f"{folder} cannot be checked for damage: an earlier version has written it, without "
            "the hashes of its files. Save or export the model again.",
            stacklevel=2,
        )
        return
    found = problems(folder, record, HASHED_BYTES)
    wrong = {name: problem for name, problem in found.items() if problem}
    if wrong:
        listed = "; ".join(f"{name} {problem}" for name, problem in wrong.items())
        raise ValueError(f"{folder} is damaged: {listed}. {_CURE}")
    for name in strangers(folder, record, read):
        raise ValueError(
            f"{folder} has a file {name} that was not written with the others and would "
            "be read with them. Move it away, or write the folder again."
        )


def strangers(folder: Path, record: Mapping[str, Any], read: Sequence[str]) -> list[str]:
    """Return the entries that a reader would take for a part of a folder, and that are none.

    Args:
        folder: The folder.
        record: Its record, as `record_of` returns it, with hashes.
        read: As for `verify`.
    """
    names = {entry.name for entry in matching(folder, read)}
    return sorted(names - {RECORD, *record["files"]})


def problems(folder: Path, record: Mapping[str, Any], most: int | None = None) -> dict[str, str]:
    """Compare the files of a folder with its record.

    Args:
        folder: The folder.
        record: Its record, as `record_of` returns it, with hashes.
        most: How many bytes to read for hashes, from the smallest file on; None for all.

    Returns:
        Each file of the record, and what is wrong with it; an empty text if nothing is.

    """
    files = record["files"]
    by_size = sorted(files, key=lambda name: files[name]["bytes"])
    read = accumulate(files[name]["bytes"] for name in by_size)
    hashed = {
        name for name, total in zip(by_size, read, strict=True) if most is None or total <= most
    }
    return {name: _problem(folder / name, files[name], name in hashed) for name in files}


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Return whether the entries of a record are those that were written, and describe files."""
    from pydantic import ValidationError

    from deos_fx.schema import ENTRIES

    try:
        ENTRIES.validate_python(record.get("files"))
    except ValidationError:
        return False
    return record.get("sha256") == own_hash(record)


def _problem(path: Path, entry: Mapping[str, Any], hashed: bool) -> str:
    if not path.is_file():
        return "is a folder, not a file" if path.is_dir() else "is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {counted(f'{size:,}', 'byte')} instead of {entry['bytes']:,}"
    if hashed and file_hash(path) != entry["sha256"]:
        return "is not the file that was written (its SHA-256 differs)"
    return ""


def stamp(folder: Path) -> tuple[int, ...]:
    """Return what tells whether a folder has been written anew; take it before anything is read."""
    try:
        found = (folder / RECORD).stat()
    except FileNotFoundError:
        return ()
    # Not what the record says: the same model may have been written again, with others between.
    return found.st_ino, found.st_mtime_ns, found.st_size


def check_unchanged(folder: Path, before: tuple[int, ...]) -> None:
    """Refuse what was read from a folder if somebody has begun to write it meanwhile.

    Args:
        folder: The folder.
        before: Its `stamp` before anything was read.

    Raises:
        ValueError: If it has another one now.
    """
    if stamp(folder) != before:
        raise ValueError(f"{folder} was written anew after its loading began. Load it again.")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_hash(record: Mapping[str, Any], entry: str = "sha256") -> str:
    """Return the SHA-256 of a record without the entry that holds it."""
    rest = {name: value for name, value in record.items() if name != entry}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
