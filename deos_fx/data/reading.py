"""Read records from a JSONL or CSV file, or from a folder that `datasets` saved."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deos_fx.data.record import Record
from deos_fx.data.rows import CHATS, FORM, record_of

__all__ = ["read_records"]

# Rows of a table that are read at a time.
_ROWS = 64

# What helps where `datasets` reads more than we do: folders of images, tables.
_SAVE = "save what datasets.load_dataset reads (save_to_disk), or write JSONL"


def read_records(path: str | os.PathLike[str], *, urls: bool = False) -> list[Record]:
    """Read questions about images.

    A row has ``image`` (a path, relative to the file's folder) or a list of ``images``, ``prompt``
    or ``question``, and optionally ``answer`` and ``kind``. Instead of a prompt it may have
    ``messages``, the turns of a chat as transformers or OpenAI write them, or ``conversations``, as
    LLaVA's files do; if the assistant's turn is the last, it is the answer. Other entries are kept
    as ``extra``.

    Args:
        path: A JSONL file with one object a line; a CSV file with a line of names, in which
            ``images``, ``messages`` and ``conversations`` are JSON; or a folder that
            ``Dataset.save_to_disk`` wrote. Files are in UTF-8, with or without a byte order mark.
        urls: Whether images may be downloaded where a row has an http or https URL.

    Returns:
        A record for each row; empty lines count as none.

    Raises:
        ImportError: If the path is a folder and `datasets` is not installed.
        ValueError: If a row is wrong, an image is missing, only some rows have an answer, or there
            are none; the message names the file and, for one row, its line.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        folder, rows = path, _of_dataset(path)
    else:
        folder = path.parent
        rows = _of_csv(path) if path.suffix.lower() == ".csv" else _of_jsonl(path)
    records = [record_of(row, folder, where, urls) for where, row in rows]
    if not records:
        raise ValueError(f"{path} is empty; {FORM}")
    missing = [record.where for record in records if record.answer is None]
    if 0 < len(missing) < len(records):
        raise ValueError(
            f"{missing[0]}: there is an answer in {len(records) - len(missing)} of {len(records)} "
            "rows, and this is the first without; give all of them one (to search with labels) or "
            "none (to search by the model's own answers)"
        )
    return records


def _text(path: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        ValueError: If it is not; the message names the line.
    """
    contents = path.read_bytes()
    if contents.startswith(b"PAR1"):
        raise ValueError(f"{path} is a table of Parquet; {_SAVE}")
    if contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is in UTF-16; save it in UTF-8")
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line} is not UTF-8: {error.reason}; give a text file, JSONL or CSV"
        ) from error


def _of_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row is, and the row."""
    text = _text(path)
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        raise ValueError(
            f"{path} is one list of JSON; write its objects as lines of their own (JSONL)"
        )
    # Not `splitlines`, for which there are line ends within texts of JSON.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, _json(line, where)
            except ValueError as error:
                raise ValueError(
                    f"{error}; give JSONL, an object a line, or CSV with a name that ends in .csv"
                ) from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    # A RecursionError comes from lists within lists.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _of_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row is, and the row; empty cells are None."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        names = reader.fieldnames or ()
        if len({*names}) < len(names):
            raise ValueError(f"{path}, line 1 has a name twice: {', '.join(names)}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            # Cells beyond the names are listed under None.
            if None in cells:
                raise ValueError(
                    f"{where} has more cells than the first line has names, which are "
                    f"{', '.join(names)}"
                )
            row: dict[str, Any] = {name: value or None for name, value in cells.items()}
            for name in ("images", *CHATS):
                if row.get(name):
                    row[name] = _json(row[name], f"{where}: {name}")
            yield where, row
    except csv.Error as error:
        # The line that could not be read does not count yet.
        raise ValueError(f"{path}, line {reader.line_num + 1} is not CSV: {error}") from error


def _of_dataset(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a saved dataset is, and the row, images as the bytes of their files.

    Raises:
        ImportError: If `datasets` is not installed.
    """
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"{path} is not a folder that Dataset.save_to_disk wrote; {_SAVE}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path} is a folder, and reading what Dataset.save_to_disk wrote needs datasets "
            "(pip install datasets); or give a JSONL or CSV file"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not a folder that Dataset.save_to_disk wrote; {_SAVE}"
        ) from error
    if not isinstance(found, datasets.Dataset):
        raise ValueError(
            f"{path} has the parts {', '.join(found)}; give one, as {path / next(iter(found))}"
        )
    # As they are stored: decoding is ours, with its limits.
    number = 0
    for table in found.with_format("arrow").iter(batch_size=_ROWS):
        for row in table.to_pylist():
            number += 1
            yield f"{path}, row {number}", row
