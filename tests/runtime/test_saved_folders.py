"""Folders of reduced models: whole at every instant, and refused when they are damaged."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import contents, damaged, kills
from learned import learned_at
from tiny import tiny_llava

from deos_fx.contents import RECORD
from deos_fx.policy.policy import Policy
from deos_fx.runtime.reduced_model import ReducedModel
from deos_fx.runtime.saved import SavedModel, folder_for


@pytest.fixture(scope="module")
def models() -> dict[str, ReducedModel]:
    """Two models whose files have the same names and sizes, but for the policies."""
    learned = Policy((learned_at("projector", 20),))
    return {
        "old": ReducedModel(tiny_llava(1, blocks=2), learned),
        "new": ReducedModel(tiny_llava(1, blocks=2, seed=1), Policy()),
    }


@pytest.fixture(scope="module")
def saved(
    models: dict[str, ReducedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture
def target(saved: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved["old"], tmp_path / "target")


def same(one: ReducedModel, other: ReducedModel) -> bool:
    states = one.model.state_dict(), other.model.state_dict()
    equal = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    return one.policy == other.policy and equal


def test_a_kill_never_leaves_a_mixture(
    models: dict[str, ReducedModel], saved: dict[str, Path], target: Path
) -> None:
    seen = set()
    for _ in kills(lambda: models["new"].save_pretrained(target)):
        try:
            found = ReducedModel.from_pretrained(target)
            seen |= {name for name, model in models.items() if same(found, model)} or {"a mixture"}
        except ValueError as error:
            assert "is incomplete" in str(error) and "Save or export the model again" in str(error)
            seen.add("incomplete")
        # As before, with what the kill has left.
        shutil.rmtree(target)
        shutil.copytree(saved["old"], target)
    assert seen == {"old", "incomplete", "new"}
    models["new"].save_pretrained(target)
    assert contents(target).keys() == contents(saved["new"]).keys()
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1
    assert not list(target.parent.rglob(".*"))


def test_a_kill_never_leaves_a_mixture_of_weights_in_several_files(
    models: dict[str, ReducedModel], saved: dict[str, Path], tmp_path: Path
) -> None:
    """Of more files than before, and of fewer."""
    parts, model = tmp_path / "parts", models["new"].model
    with pytest.MonkeyPatch.context() as patch:
        write = functools.partial(model.save_pretrained, max_shard_size="200KB")
        patch.setattr(model, "save_pretrained", write)
        models["new"].save_pretrained(parts)
    assert same(ReducedModel.from_pretrained(parts), models["new"])
    states = {"old": contents(saved["old"]), "parts": contents(parts)}
    assert len(states["parts"]) > len(states["old"])
    target = tmp_path / "target"
    for before, after in (("old", "parts"), ("parts", "old")):
        seen = set()

        def replace(after: str = after) -> None:
            with folder_for(target) as folder:
                for name, data in states[after].items():
                    (folder / name).write_bytes(data)

        restart(target, states[before])
        for _ in kills(replace):
            try:
                SavedModel(target)
                found = contents(target)
                seen |= {x for x, state in states.items() if found == state} or {"a mixture"}
            except ValueError as error:
                assert "is incomplete" in str(error)
                seen.add("incomplete")
            restart(target, states[before])
        assert seen == {before, "incomplete", after}


def restart(target: Path, state: dict[str, bytes]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name, data in state.items():
        (target / name).write_bytes(data)


def test_every_damage_is_noticed(target: Path) -> None:
    count = 0
    for case in damaged(target):
        with pytest.raises(ValueError, match=r"damaged|is missing|has no deos_fx\.json"):
            ReducedModel.from_pretrained(target)
            pytest.fail(case)
        count += 1
    assert count == 13 * len(contents(target)) == 13 * 6
    assert ReducedModel.from_pretrained(target).policy.reductions


def test_files_of_another_model_are_noticed(saved: dict[str, Path], target: Path) -> None:
    for name in contents(saved["new"]):
        before = (target / name).read_bytes()
        if (saved["new"] / name).read_bytes() != before:
            shutil.copy(saved["new"] / name, target)
            with pytest.raises(ValueError, match="is damaged"):
                ReducedModel.from_pretrained(target)
            (target / name).write_bytes(before)


def test_what_transformers_would_read_besides_is_refused(target: Path) -> None:
    for name in ("adapter_config.json", "model.safetensors.index.json"):
        (target / name).write_text("{}")
        with pytest.raises(ValueError, match=f"a file {name} that was not written with the others"):
            ReducedModel.from_pretrained(target)
        (target / name).unlink()


def test_a_folder_that_is_written_while_it_is_loaded_is_refused(
    models: dict[str, ReducedModel], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Policy.load

    def load_and_wait(path: Path) -> Policy:
        policy = load(path)
        models["new"].save_pretrained(target)
        return policy

    monkeypatch.setattr(Policy, "load", load_and_wait)
    with pytest.raises(ValueError, match="written anew after its loading began"):
        ReducedModel.from_pretrained(target)


def test_folders_of_earlier_versions_are_loaded_with_a_warning(
    models: dict[str, ReducedModel], target: Path
) -> None:
    record = json.loads((target / RECORD).read_text())
    del record["files"], record["sha256"]
    (target / RECORD).write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="cannot be checked for damage") as caught:
        assert same(ReducedModel.from_pretrained(target), models["old"])
    assert len(caught) == 1


# *** what is in the target already ***


def test_only_what_transformers_or_a_runtime_would_read_is_removed(
    models: dict[str, ReducedModel], target: Path
) -> None:
    # Of larger weights, and of exports for both runtimes.
    ours = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    ours += ("prefill.onnx", "weights.data", "genai_config.json", "decoder.onnx")
    users = ("mine.safetensors", "model-1.safetensors", "pytorch_model.bin", "notes.json")
    for name in (*ours, *users):
        (target / name).write_text(name)
    models["new"].save_pretrained(target)
    for name in users:
        assert (target / name).read_text() == name
    assert not any((target / name).exists() for name in (*ours, "policy.safetensors"))
    assert same(ReducedModel.from_pretrained(target), models["new"])


def unwritten(model: ReducedModel, patch: pytest.MonkeyPatch) -> Any:
    """The model, which nothing may be done with."""
    patch.setattr(model.model, "save_pretrained", lambda *args: pytest.fail("worked before checks"))
    return model


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_folders_in_the_place_of_files_are_refused_before_the_work(
    models: dict[str, ReducedModel], target: Path, patch: pytest.MonkeyPatch
) -> None:
    (target / "policy.json").unlink()
    (target / "policy.json" / "mine").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"policy\.json: it is a folder. Move it away"):
        unwritten(models["new"], patch).save_pretrained(target)
    assert (target / "policy.json" / "mine").exists()


def test_adapters_in_the_target_are_refused_before_the_work(
    models: dict[str, ReducedModel], target: Path, patch: pytest.MonkeyPatch
) -> None:
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter_config\.json: transformers would load"):
        unwritten(models["new"], patch).save_pretrained(target)
