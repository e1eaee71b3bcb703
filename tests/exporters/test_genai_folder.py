"""Folders for onnxruntime-genai: whole at every instant, and refused when they are damaged.

As in test_export_folder.py, what is written are graphs of one addition.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from kills import contents, damaged, kills
from test_export_folder import program

from deos_fx.contents import FILES
from deos_fx.exporters import genai as genai_module
from deos_fx.exporters.genai import export_genai
from deos_fx.exporters.genai_inputs import genai_inputs
from deos_fx.files import fresh_folder
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.runtime.reduced_model import ReducedModel

KEEP = {"old": 9, "new": 5}


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return tiny.inputs(tiny.shared_llava(2), 1)


@pytest.fixture(autouse=True, scope="module")
def stands() -> Iterator[None]:
    """Stand-ins for the graphs."""

    def traced(reduced: ReducedModel, example: Any, tell: Any) -> Any:
        keep = reduced.policy.counts(tiny.VISUAL)[0]
        states = {"0": {"key": torch.zeros(1, 2, 0, 16)}}
        decoder = SimpleNamespace(inputs={"past_key_values": states})
        parts = SimpleNamespace(graphs={"decoder": decoder}, images=[(tiny.VISUAL, keep)])
        return parts, {name: program(keep) for name in ("vision", "embedding", "decoder")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai_module, "_traced", traced)
        patch.setattr(genai_module, "fuse", lambda programs, device: None)
        yield


def write(target: Path, name: str) -> None:
    one = Reduction("projector", KEEP[name], position="compact", mass_bias=0.0)
    reduced = ReducedModel(tiny.shared_llava(2), Policy((one,)))
    export_genai(reduced, target, device="cpu", verify=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write(tmp_path / "target", "old")
    return tmp_path / "target"


def test_a_kill_never_leaves_a_mixture(target: Path, batch: dict[str, Any], tmp_path: Path) -> None:
    (target / "images.safetensors").write_text("of an earlier export")
    write(target, "new")
    write(tmp_path / "old", "old")
    states = {"old": contents(tmp_path / "old"), "new": contents(target)}
    assert states["old"].keys() == states["new"].keys()

    def replace() -> None:
        # What is written takes longer than to write it.
        with fresh_folder(target, FILES, whole=True) as folder:
            for name, data in states["new"].items():
                (folder / name).write_bytes(data)

    seen = set()
    shutil.rmtree(target)
    shutil.copytree(tmp_path / "old", target)
    for _ in kills(replace):
        try:
            left = genai_inputs(target, batch)["num_image_tokens"].item()
            found = contents(target)
            same = {name for name, state in states.items() if found == state}
            seen |= {name for name in same if KEEP[name] == left} or {"a mixture"}
        except ValueError as error:
            assert "is incomplete" in str(error)
            seen.add("incomplete")
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "old", target)
    assert seen == {"old", "incomplete", "new"}


def test_every_damage_is_noticed(target: Path, batch: dict[str, Any]) -> None:
    count = 0
    for case in damaged(target):
        with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|has no deos_fx\.json"):
            genai_inputs(target, batch)
            pytest.fail(case)
        count += 1
    assert count == 13 * len(contents(target)) == 13 * 9
    genai_inputs(target, batch)


def test_what_would_be_read_besides_is_refused(target: Path, batch: dict[str, Any]) -> None:
    (target / "images.safetensors").write_text("")
    with pytest.raises(ValueError, match="images.safetensors that was not written with the others"):
        genai_inputs(target, batch)
