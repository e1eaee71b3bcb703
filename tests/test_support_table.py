"""docs/families.md has every family, and what it says is what the checks say."""

from __future__ import annotations

from pathlib import Path

import more_families5
import support_table
from families import FAMILIES, TWINS

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def rows() -> dict[str, list[str]]:
    """The table: family -> its cells."""
    table = PAGE.read_text(encoding="utf-8").split("| family |")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return {row[0]: row for row in cells[2:]}


def test_the_table_has_every_family() -> None:
    # A newer transformers may fail in Llama 4 itself, and an older one lacks some families.
    assert list(rows()) == sorted({*FAMILIES, *TWINS, *more_families5.TWINS, "llama4"})


def test_a_row_can_be_made_again() -> None:
    *found, _ = support_table.family_row("internvl")
    assert found == rows()["internvl"][:-1]


def test_what_fails_is_said(monkeypatch) -> None:
    def fail(name: str) -> None:
        raise AssertionError("logits | differ\nby far")

    monkeypatch.setattr(support_table.checks, "test_the_empty_policy_is_bit_identical", fail)
    assert "fails: logits / differ" in support_table.family_row("internvl")
