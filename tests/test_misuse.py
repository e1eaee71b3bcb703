"""Every row of the table of misuse, and the page that it makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import misuse
import pytest
from attempts import World
from misuse import Misuse, Section

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("misuse")
    os.chdir(folder)
    yield World(folder)
    os.chdir(before)


@pytest.mark.parametrize(
    ("section", "row"), [pytest.param(*x, id=x[1].given[:60]) for x in misuse.rows()]
)
def test_misuse_is_told_in_one_line(world: World, section: Section, row: Misuse) -> None:
    with pytest.raises(row.error) as caught:
        section.attempt(row.given, world)
    assert type(caught.value) is row.error
    said = str(caught.value).replace(f"{world.folder}{os.sep}", "")
    assert row.says.removeprefix("... ").removesuffix(" ...") in said
    assert "\n" not in str(caught.value)


def test_there_are_many_kinds() -> None:
    given = [(section.title, row.given) for section, row in misuse.rows()]
    assert len({*given}) == len(given) >= 60


def test_the_page_is_that_of_the_table() -> None:
    assert (ROOT / "docs/misuse.md").read_text(encoding="utf-8") == misuse.page(), (
        "write it again: .venv/bin/python tests/misuse.py docs/misuse.md"
    )
