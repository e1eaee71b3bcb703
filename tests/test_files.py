"""Folders that are replaced as a whole, or not at all."""

from pathlib import Path

import pytest

from deos_fx.files import fresh_folder


def test_fresh_folder_replaces_its_own_entries_only(tmp_path):
    (tmp_path / "out" / "old").mkdir(parents=True)
    (tmp_path / "out" / "stays").write_text("1")
    (tmp_path / "out" / "old" / "gone").write_text("1")
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "old").mkdir()
        (folder / "old" / "new").write_text("2")
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["out", str(Path("out/old")), str(Path("out/old/new")), str(Path("out/stays"))]


def test_fresh_folder_leaves_nothing_when_the_work_fails(tmp_path):
    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "a" / "b") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
