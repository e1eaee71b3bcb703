"""The folder of a search's steps: whatever was changed in it, a search does not go on from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import saved_search, search_state
from kills import damaged
from safetensors.torch import load_file, save_file

from deos_fx.contents import file_hash, own_hash
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.schema import SearchFile, StepEntry
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.learned import Learned
from deos_fx.policy.reduction import Reduction

COSTS = ("visual_tokens", "flops", "kv_cache", "latency_ms")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_search(tmp_path)
    return tmp_path


def test_every_record_of_a_step_is_read_back(folder: Path) -> None:
    again = search_state()
    again.resume(folder)
    assert again.step == 3
    record = json.loads((folder / "search.json").read_text())
    # In the order in which it was written, so that a search that goes on reports the same.
    assert json.dumps(again.history) == json.dumps(record["history"])


def test_the_parameters_of_the_lowest_loss_are_kept() -> None:
    state = search_state()
    (value, *_) = state.parameters
    for loss, number in ((math.inf, 0.1), (2.0, 0.2), (2.0, 0.3), (1.0, 0.4), (3.0, 0.5)):
        with torch.no_grad():
            value.fill_(number)
        state.consider(loss)
    assert state.best_loss == 1.0
    state.take_best()
    assert value.unique().tolist() == pytest.approx([0.4])


def test_parameters_go_by_their_sites() -> None:
    sites = ("projector", "decoder.1", "vision.0")
    start = {site: Reduction(site, 0.5, scores={"feature_norm": 1.0}) for site in sites}
    made = {site: RelaxedReduction(x, activation=1.0, retention=0.5) for site, x in start.items()}
    state = SearchState.start(made, AugmentedLagrangian({"flops": 2.0}), {})
    assert state.by_site() == made
    # Those that make no difference are not trained.
    assert 0 < len(state.parameters) == sum(map(len, (g["params"] for g in groups(state))))
    assert all(parameter.requires_grad for parameter in state.parameters)


def groups(state: SearchState) -> Any:
    return state.optimizer.param_groups


def test_learned_parts_have_rates_of_their_own() -> None:
    learned = Learned({"probe": torch.ones(16), "metric": torch.ones(16, 2)})
    similarity = {"feature": 0.5, "learned": 0.5}
    start = Reduction("projector", 0.5, learned=learned, similarity=similarity, selector="greedy")
    module = RelaxedReduction(start, activation=1.0, retention=0.5)
    state = SearchState.start({"projector": module}, AugmentedLagrangian({"flops": 2.0}), {})
    names = [name for name, x in state.reductions.named_parameters() if x.requires_grad]
    rates = dict(zip(names, (group["full_rate"] for group in groups(state)), strict=True))
    assert rates.pop("projector.learned.probe") == 0.1 / 4
    assert rates.pop("projector.learned.metric") == 0.005
    assert rates.pop("projector.scores") == 0.02
    assert {*rates.values()} == {0.05}
    assert len(state.directions) == 2


def test_a_record_may_be_larger_than_other_files(tmp_path: Path) -> None:
    state, again = search_state(), search_state()
    state.settings = again.settings = {"sums": "1" * 2**20}
    state.consider(0.5)
    state.save(tmp_path)
    again.resume(tmp_path)
    assert again.best_loss == 0.5


def test_the_schema_knows_every_cost() -> None:
    assert {name for name in COSTS} | {f"multiplier_{name}" for name in COSTS} < {
        *StepEntry.model_fields
    }
    assert "tensors" in SearchFile.model_fields


def last(record: Any) -> Any:
    return record["history"][-1]


RECORDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a shortened history": (lambda r: r["history"].pop(), "history has 2 steps, but its tensors"),
    "a history with a gap": (lambda r: r["history"].pop(0), "not those from 1 to 2"),
    "a shorter history, renamed": (
        lambda r: (r["history"].pop(), r.update(tensors="step-2.safetensors")),
        "2 steps, and its optimizer",
    ),
    "a step that counts as none": (lambda r: last(r).update(finite=False), "2 steps, and its opt"),
    "a multiplier of NaN": (
        lambda r: r["multipliers"].update(flops=float("nan")),
        "multipliers.flops is nan; it should be a finite number",
    ),
    "a negative multiplier": (lambda r: r["multipliers"].update(flops=-1.0), "is negative"),
    "another multiplier": (lambda r: r.update(multipliers={"speed": 0.0}), "those of speed"),
    "a folder above": (lambda r: r.update(tensors="../step-3.safetensors"), "match pattern"),
    "an absolute path": (lambda r: r.update(tensors="/etc/passwd"), "match pattern"),
    "a flag as a number": (lambda r: r.update(best_step=True), "best_step is True"),
    "a best step to come": (lambda r: r.update(best_step=4), "that of step 4"),
    "a misspelt field": (lambda r: last(r).update(taks=1.0), "has no field 'taks'"),
    "a field less": (lambda r: last(r).pop("keep"), r"history\[2\] lacks the field 'keep'"),
    "a text as a loss": (lambda r: last(r).update(task="low"), "task is 'low'"),
    "no history": (lambda r: r.update(history={}), "should be a valid list"),
    "another version": (lambda r: r.update(version=1), "version 1, and this release reads"),
    "a flag as a version": (lambda r: r.update(version=True), "version True"),
    "something else": (lambda r: r.update(deos_fx="onnx"), 'does not say "deos_fx": "search"'),
}


def stamped(record: dict[str, Any]) -> str:
    """The text of a record with its hash."""
    return json.dumps(record | {"record": own_hash(record, "record")})


@pytest.mark.parametrize("name", RECORDS)
def test_changed_records_are_refused(folder: Path, name: str) -> None:
    change, message = RECORDS[name]
    path = folder / "search.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(stamped(record))
    if "renamed" in name:
        (folder / "step-3.safetensors").rename(folder / record["tensors"])
    with pytest.raises(ValueError, match=rf"search\.json .*{message}"):
        search_state().resume(folder)


TENSORS: dict[str, tuple[Callable[[Any], object], str]] = {
    "NaN": (lambda t: next(iter(t.values())).fill_(torch.nan), "not finite"),
    "one less": (lambda t: t.pop(min(name for name in t if name[0] == "n")), "lacks"),
    "one more": (lambda t: t.update({"now/extra": torch.zeros(1)}), "has 'extra'"),
    "another shape": (lambda t: t.update({"adam/0/exp_avg": torch.zeros(7)}), "of shape \\(7,\\)"),
    "a best state of another shape": (
        lambda t: t.update({max(name for name in t if name[0] == "b"): torch.zeros(7)}),
        "the best state",
    ),
    "another moment": (lambda t: t.update({"adam/0/more": torch.zeros(1)}), "has '0/more'"),
    "no moments": (
        lambda t: [t.pop(name) for name in [*t] if name.startswith("adam/")],
        r"3 steps, and its optimizer \[\]",
    ),
    "a number of another type": (
        lambda t: t.update({"adam/0/exp_avg": t["adam/0/exp_avg"].double()}),
        "float64",
    ),
    "moments of some parameters": (
        lambda t: [t.pop(name) for name in [*t] if name.startswith("adam/0/")],
        "3 steps, and its optimizer",
    ),
    "several counts": (lambda t: t.update({"adam/0/step": torch.ones(2)}), "and its optimizer"),
    "an unknown prefix": (lambda t: t.update({"later/x": torch.zeros(1)}), "tensor 'later/x'"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_changed_tensors_are_refused(folder: Path, name: str) -> None:
    change, message = TENSORS[name]
    path = folder / "step-3.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    record = json.loads((folder / "search.json").read_text())
    # What is checked beyond damage: somebody may have written a hash as well.
    (folder / "search.json").write_text(stamped(record | {"sha256": file_hash(path)}))
    untouched = search_state()
    before = {name: value.clone() for name, value in untouched.reductions.state_dict().items()}
    with pytest.raises(ValueError, match=f"search.json does not go with its tensors: .*{message}"):
        untouched.resume(folder)
    after = untouched.reductions.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_only_files_of_earlier_states_are_removed(folder: Path) -> None:
    mine = folder / "step-2-mine.safetensors"
    mine.write_text("mine")
    (folder / "step-2.safetensors").write_text("old")
    saved_search(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {mine.name, "search.json", "step-3.safetensors"}


def test_every_damage_is_noticed(folder: Path) -> None:
    for case in damaged(folder):
        if case in ("search.json: missing", "search.json: a folder"):
            continue
        with pytest.raises((ValueError, FileNotFoundError, IsADirectoryError)):
            search_state().resume(folder)
            pytest.fail(case)
    search_state().resume(folder)


def test_other_numbers_in_a_record_are_damage(folder: Path) -> None:
    path = folder / "search.json"
    path.write_text(path.read_text().replace('"flops": 3.0', '"flops": 3.5', 1))
    with pytest.raises(ValueError, match=r"search\.json .*its entries are not those that were"):
        search_state().resume(folder)


def test_damaged_tensors_are_named(folder: Path) -> None:
    path = folder / "step-3.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"step-3\.safetensors is damaged"):
        search_state().resume(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"step-3\.safetensors"):
        search_state().resume(folder)
