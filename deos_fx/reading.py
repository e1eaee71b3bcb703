"""Read files that may be damaged or hostile: JSON by its schema, and tensors.

Whatever is wrong with a file ends in one ValueError of one line, which names the file, what was
found where in it, and what was expected.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "CONTROLS",
    "JSON_BYTES",
    "JSON_DEPTH",
    "TENSOR_BYTES",
    "TEXT_LENGTH",
    "as_record",
    "blaming",
    "parse_json",
    "read_json",
    "read_record",
    "read_tensors",
    "validated",
]

JSON_BYTES = 2**20
"""The largest JSON file that is read, unless its reader says otherwise."""
JSON_DEPTH = 32
"""How deep lists and objects in a file may be nested."""
TENSOR_BYTES = 2**30
"""The largest file of tensors that is read."""
TEXT_LENGTH = 1000
"""How many characters a name in a file may have."""
CONTROLS = r"\x00-\x1f\x7f-\x9f"
"""The characters that no name may have, as a pattern: a terminal would obey them."""
# How many faults of a file are told.
_TOLD = 3

_Schema = TypeVar("_Schema", bound="BaseModel")


def read_record(
    path: str | os.PathLike[str],
    schema: type[_Schema],
    what: str,
    cure: str,
    limit: int = JSON_BYTES,
) -> _Schema:
    """Read a JSON file that says in ``deos_fx`` and ``version`` what it is.

    Args:
        path: The file.
        schema: Its schema.
        what: What it should be, for errors: ``the manifest of an export``.
        cure: What to do if it is not, for errors: a sentence.
        limit: Largest number of bytes.

    Returns:
        The record.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it does not fit the schema.
    """
    try:
        data = read_json(path, limit)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not {what}: {error}. {cure}") from error
    return as_record(path, data, schema, what, cure)


def as_record(
    path: str | os.PathLike[str], data: object, schema: type[_Schema], what: str, cure: str
) -> _Schema:
    """Check the data of a JSON file; see `read_record`.

    Raises:
        ValueError: If it does not fit the schema.
    """
    try:
        return validated(schema, data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not {what}: {error}. {cure}") from error


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is larger than `limit` bytes or something else; without its name.
    """
    with Path(path).open("rb") as file:
        # One byte more tells a file that is too long, also where the system knows no size.
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return parse_json(data.decode("utf-8"))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged or larger than `TENSOR_BYTES`.
    """
    # Opened here, as the errors of safetensors do not name the file.
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    if size > TENSOR_BYTES:
        raise ValueError(
            f"{os.fspath(path)} has {size} bytes; a file of tensors has at most {TENSOR_BYTES}"
        )
    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:
        # A KeyError says that torch has no such type of numbers.
        raise ValueError(f"{os.fspath(path)} is damaged: {error}; restore it") from error


def parse_json(text: str) -> Any:
    """Parse JSON whose names are unique and whose nesting is limited.

    Raises:
        ValueError: If the text is something else.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
        _check_depth(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"lists and objects are nested more than {JSON_DEPTH} deep") from None
    return data


def validated(schema: type[_Schema], data: object) -> _Schema:
    """Check data by a schema.

    Args:
        schema: The schema.
        data: What was parsed.

    Returns:
        The data as the schema's object.

    Raises:
        ValueError: With the first few faults, in one line.
    """
    from pydantic import ValidationError

    kind, version = (get_args(schema.model_fields[x].annotation)[0] for x in ("deos_fx", "version"))
    if not isinstance(data, dict) or data.get("deos_fx") != kind:
        raise ValueError(f'it does not say "deos_fx": "{kind}"')
    # Compared as text, because Python counts True and 1.0 as 1.
    if repr(data.get("version")) != repr(version):
        given = reprlib.repr(data.get("version"))
        raise ValueError(f"it has version {given}, and this release reads version {version}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        faults = list(_faults(schema, data, error.errors(include_url=False)))
        more = f"; and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
        raise ValueError("; ".join(faults[:_TOLD]) + more) from None


@contextmanager
def blaming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file or folder it was that another package could not read.

    Packages raise whatever a damaged file leads them into, often without its name, some of it
    classes of their own.

    Raises:
        ValueError: In the place of such an error.
    """
    try:
        yield
    except OSError as error:
        if "\n" not in str(error):
            raise
        raise OSError(_one_line(error)) from error
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        # Case: no fault of the files.
        raise
    except Exception as error:
        if isinstance(error, ValueError) and os.fspath(path) in str(error):
            # Case: told well.
            raise
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ValueError(
            f"{_damaged(Path(path))} cannot be loaded ({reason}). If a file is damaged or of "
            "another model, save or download it again."
        ) from error


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), TEXT_LENGTH)


def _damaged(folder: Path) -> Path:
    """Return the first file of a folder that is not what its name says; the folder if all are."""
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            else:
                with safe_open(path, "pt"):
                    # Opened only: its header says whether it is whole.
                    pass
        except (OSError, ValueError, RecursionError, SafetensorError):
            return path
    return folder


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; readers differ in which of two equal names counts, so none is taken."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {reprlib.repr(twice)} is given twice")
    return values


def _check_depth(data: object) -> None:
    level = [data]
    for _ in range(JSON_DEPTH):
        level = [child for value in level for child in _children(value)]
    if any(isinstance(value, dict | list) for value in level):
        raise RecursionError


def _children(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


# *** faults in words ***


def _faults(schema: type[BaseModel], data: object, errors: Sequence[Any]) -> Iterator[str]:
    """Describe what a schema has found, in the words of the file and one fault for each place."""
    # A value that may be of two kinds has an error for each of them.
    places: dict[str, tuple[object, list[str]]] = {}
    # A name that is unknown tells more than one that is missing, if it is misspelt.
    for error in sorted(errors, key=lambda error: error["type"] != "extra_forbidden"):
        place, value = _place(data, error["loc"])
        if error["type"] == "missing":
            yield f"{place or 'it'} lacks the field {error['loc'][-1]!r}"
        elif error["type"] == "extra_forbidden":
            parent, _ = _place(data, error["loc"][:-1])
            known = ", ".join(_fields(schema, error["loc"][:-1]))
            given = reprlib.repr(error["loc"][-1])
            yield f"{parent or 'it'} has no field {given}; the fields are {known}"
        elif error["type"] == "value_error":
            yield f"{place}: {error['ctx']['error']}".removeprefix(": ")
        else:
            expected = re.sub("^[A-Z][a-z]+ should ", "", error["msg"])
            places.setdefault(place, (value, []))[1].append(expected)
    for place, (value, reasons) in places.items():
        yield f"{place or 'it'} is {reprlib.repr(value)}; it should {', or '.join(reasons)}"


def _place(data: Any, location: Sequence[Any]) -> tuple[str, Any]:
    """Return where a fault is, as ``reductions[0].keep``, and what is there."""
    place = ""
    for step in location:
        places = range(len(data)) if isinstance(data, list) else data
        if not isinstance(data, dict | list) or step not in places:
            # Case: no further place, but a field that lacks, or a kind of value that was tried.
            break
        data = data[step]
        plain = isinstance(step, str) and step.isidentifier() and len(step) <= 40
        place += f".{step}" if plain else f"[{reprlib.repr(step)}]"
    return place.removeprefix("."), data


def _fields(schema: Any, location: Sequence[str | int]) -> Sequence[str]:
    """Return the names of the fields that an object at a place may have."""
    for step in location:
        if step in schema.model_fields:
            schema = _model(schema.model_fields[step].annotation)
    return list(schema.model_fields)


def _model(annotation: Any) -> Any:
    """Return the schema in an annotation such as ``list[Schema]``."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model(part))), None)
