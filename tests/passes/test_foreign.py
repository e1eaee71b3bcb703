"""The checkpoint of another search is noticed before anything expensive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from searches import labelled, small_model

from deos_fx import Budget, search
from deos_fx.passes.search import problem
from deos_fx.passes.search.foreign import check_checkpoint

PRINT = {"model": "llava", "batches": [[2, 80]], "sums": [{"input_ids": "1.0"}]}


def state(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    settings = {"steps": 60, "seed": 0, **PRINT, **changes}
    (folder / "search.json").write_text(json.dumps({"deos_fx": "search", "settings": settings}))


def test_states_of_this_search_are_no_hindrance(tmp_path: Path) -> None:
    check_checkpoint(tmp_path / "none", 0, PRINT)
    # Other steps belong to other stages and budgets.
    state(tmp_path / "places", steps=8)
    # Damaged files are named when they are resumed.
    (tmp_path / "places" / "more").mkdir()
    (tmp_path / "places" / "more" / "search.json").write_text("{")
    check_checkpoint(tmp_path, 0, PRINT)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": "qwen"}, "other model"),
        ({"sums": [{"input_ids": "2.0"}]}, "other data"),
        # Larger than other files may be.
        ({"sums": [{"input_ids": "2" * 2**20}]}, "other data"),
        ({"batches": [[4, 80]], "sums": []}, "other data"),
        ({"seed": 3}, "other seed"),
        ({"seed": 3, "model": "qwen"}, "other model and seed"),
    ],
)
def test_states_of_other_searches_are_refused(
    changes: dict[str, object], what: str, tmp_path: Path
) -> None:
    # What is damaged is no reason not to look on.
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "search.json").write_text("{")
    state(tmp_path / "25%" / "steps", **changes)
    with pytest.raises(ValueError, match=rf"holds another search \({what}\)"):
        check_checkpoint(tmp_path, 0, PRINT)


def test_a_search_looks_before_it_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state(tmp_path / "steps")
    monkeypatch.setattr(problem, "Captures", lambda *_: pytest.fail("captured before looking"))
    model = small_model()
    with pytest.raises(ValueError, match="holds another search"):
        search(model, labelled(model), budget=Budget(visual_tokens=8), checkpoint=tmp_path)
