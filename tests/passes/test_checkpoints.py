"""States of a search on a disk that cannot be written, fills up, or is damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from searches import labelled, small_model

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search import search as search_module
from deos_fx.passes.search.checkpoints import Checkpoints
from deos_fx.passes.search.search import search
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.budget import Budget

SETTINGS: dict[str, Any] = {"budget": Budget(visual_tokens=0.25), "sites": ["projector"]}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "SearchProblem", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, error in (("file", NotADirectoryError), ("link/below", FileNotFoundError)):
        with pytest.raises(error, match=f"cannot write the folder .*{name}"):
            search(model, labelled(model), checkpoint=tmp_path / name, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_disk_that_fills_up_does_not_end_the_search(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_VARIATIONS", 1)
    whole = search(model, labelled(model), steps=40, **SETTINGS)
    saves: list[int] = []
    save = SearchState.save

    def save_once(state: SearchState, folder: Path) -> None:
        saves.append(state.step)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")
        save(state, folder)

    monkeypatch.setattr(SearchState, "save", save_once)
    message = "goes on, but its state cannot be saved: .*No space left"
    with pytest.warns(UserWarning, match=message) as caught:
        found = search(model, labelled(model), steps=40, checkpoint=tmp_path, **SETTINGS)
    assert len(caught) == 1 and len(saves) > 2
    assert found.policy == whole.policy and found.history == whole.history
    # The first state is there still.
    monkeypatch.setattr(SearchState, "save", save)
    again = search(model, labelled(model), steps=40, checkpoint=tmp_path, **SETTINGS)
    assert again.policy == whole.policy and again.history == whole.history


def test_folders_in_folders_warn_together(tmp_path: Path) -> None:
    class Full:
        def save(self, folder: Path) -> None:
            raise OSError(f"{folder.name} is full")

    states: Any = Full()
    saved = Checkpoints.at(tmp_path)
    with pytest.warns(UserWarning, match=re.escape("one is full")) as caught:
        for name in ("one", "two"):
            saved.within(name).save(states)
            saved.within(name).within("more").save(states)
    assert len(caught) == 1
    assert not list(tmp_path.iterdir())
