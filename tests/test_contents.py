"""Records of folders: sizes and hashes of every file, and of the record itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from kills import contents

from deos_fx import contents as module
from deos_fx.contents import (
    RECORD,
    add_to_record,
    check_unchanged,
    problems,
    record_of,
    stamp,
    verify,
    write_record,
)
from deos_fx.files import write_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, text in {"small": "12", "large": "1234567890", "in/small": "1234"}.items():
        (tmp_path / name).write_text(text)
    write_record(tmp_path, {"deos_fx": "test"})
    return tmp_path


def test_a_record_has_size_and_hash_of_every_file(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    assert record["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents(folder).items()
        if name != RECORD
    }
    verify(folder, record)


def test_files_can_be_added(folder: Path) -> None:
    (folder / "more").write_text("more")
    verify(folder, record_of(folder))
    assert "more" not in problems(folder, record_of(folder))
    add_to_record(folder)
    assert problems(folder, record_of(folder))["more"] == ""
    (folder / "more").write_text("less")
    with pytest.raises(ValueError, match="damaged: more is not the file that was written"):
        verify(folder, record_of(folder))


def test_hashes_are_read_from_the_smallest_file_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("small", "large", "in/small"):
        (folder / name).write_text("x" * (folder / name).stat().st_size)
    record = record_of(folder)
    for most, wrong in ((1, set()), (6, {"small", "in/small"}), (None, {*record["files"]})):
        found = problems(folder, record, most)
        assert {name for name, problem in found.items() if problem} == wrong
    monkeypatch.setattr(module, "HASHED_BYTES", 1)
    verify(folder, record)
    (folder / "large").write_text("x")
    with pytest.raises(ValueError, match="large has 1 byte instead of 10"):
        verify(folder, record)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(deos_fx="other"),
        lambda record: record.pop("sha256"),
        lambda record: record.pop("files"),
        lambda record: record.update(more=1),
        lambda record: record["files"].pop("small"),
        lambda record: record["files"]["small"].update(bytes=3),
    ],
)
def test_a_record_that_was_changed_is_damaged(folder: Path, change: Any) -> None:
    record = record_of(folder)
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"deos_fx\.json is damaged: its entries"):
        record_of(folder)


@pytest.mark.parametrize(
    "files",
    [
        [],
        {"../other": {"bytes": 1, "sha256": ""}},
        {"/etc/hosts": {"bytes": 1, "sha256": ""}},
        {"in\\..\\..\\other": {"bytes": 1, "sha256": ""}},
        {"c:other": {"bytes": 1, "sha256": ""}},
        {"small": {"bytes": True}},
        {"small": {"bytes": "2"}},
        {"small": 2},
    ],
)
def test_records_that_nobody_writes_are_refused(folder: Path, files: Any) -> None:
    """Whoever can write a record can write the hash of it, too."""
    record = {"deos_fx": "test", "files": files}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / RECORD).write_text(json.dumps(record | {"sha256": digest}))
    with pytest.raises(ValueError, match=r"deos_fx\.json is damaged: its entries"):
        record_of(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00" * 9, "[" * 100_000, '{"files": ' * 980 + "}" * 980]
)
def test_a_record_that_is_none_is_damaged(folder: Path, text: str) -> None:
    (folder / RECORD).write_text(text)
    with pytest.raises(ValueError, match=r"deos_fx\.json is damaged: "):
        record_of(folder)
    (folder / RECORD).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"deos_fx\.json is damaged: "):
        record_of(folder)


def test_what_is_written_while_it_is_read_is_refused(folder: Path) -> None:
    before, text = stamp(folder), (folder / RECORD).read_text()
    check_unchanged(folder, before)
    # Also where it says the same again.
    write_text(folder / RECORD, text)
    with pytest.raises(ValueError, match="written anew after its loading began"):
        check_unchanged(folder, before)
    (folder / RECORD).unlink()
    with pytest.raises(ValueError, match="written anew after its loading began"):
        check_unchanged(folder, before)
