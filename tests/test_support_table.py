"""docs/families.md has every family, and what it says is what the checks say."""

from __future__ import annotations

from pathlib import Path

import pytest
import support_table
from families import FAMILIES, OF_TIMM, ONLY_NEWER, STATEFUL, TWINS

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def rows() -> dict[str, list[str]]:
    """The table: family -> its cells."""
    table = PAGE.read_text(encoding="utf-8").split("| family |")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    return {row[0]: row for row in cells[2:]}


def test_the_table_has_every_family() -> None:
    # A newer transformers may fail in Llama 4 itself, an older one lacks some families, and timm
    # may not be there.
    assert list(rows()) == sorted({*FAMILIES, *TWINS, *ONLY_NEWER, *OF_TIMM, "llama4"})


def test_no_class_of_transformers_is_forgotten() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = {
        line.split("|")[i].strip() for line in text.splitlines() if line[:2] == "| " for i in (1, 2)
    }
    classes = support_table.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    missing = {family for family, name in classes.items() if not {family, name} & named}
    # docs/limits.md says why the one is refused; of the other there is no small config.
    assert missing <= {"inkling2_loop", "diffusion_gemma"}


def test_a_row_can_be_made_again() -> None:
    *found, _ = support_table.family_row("internvl")
    assert found == rows()["internvl"][:-1]


@pytest.mark.parametrize("name", ["qwen3_5", "lfm3_vl", "inkling_mm_model", "idefics2"])
def test_towers_and_states_are_what_is_found(name: str) -> None:
    assert [*support_table._places(name)] == rows()[name][2:5]


def test_what_is_said_of_towers_and_states() -> None:
    towers, states = ({name: row[i] for name, row in rows().items()} for i in (2, 3))
    assert towers["llava"] == "0 to 1: patches" and towers["qwen2_vl"] == "0 to 1: groups"
    assert towers["fuyu"] == "none: there is no tower of transformer blocks"
    assert all(cell.startswith("none: ") or cell[0].isdigit() for cell in towers.values())
    assert states["qwen3_5"] == "0 to 1, 3" and not states["llava"]
    assert {name for name, cell in states.items() if cell} == {*STATEFUL} - {"llama4"}


def test_cells_that_were_not_run_stay() -> None:
    row = ("llava", *["new"] * 7, "not run")
    assert support_table._with_former_cells(row, {"llava": (*row[:-1], "yes")})[-1] == "yes"
    assert support_table._with_former_cells(row, {}) == row


def test_what_fails_is_said(monkeypatch) -> None:
    def fail(name: str) -> None:
        raise AssertionError("logits | differ\nby far")

    monkeypatch.setattr(support_table.checks, "test_the_empty_policy_is_bit_identical", fail)
    assert "fails: logits / differ" in support_table.family_row("internvl")
