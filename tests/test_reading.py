"""Files that are damaged at random end in a ValueError that names them, and in nothing else."""

from __future__ import annotations

import json
import random
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import schemas
import torch
from attempts import WHOLE, learned_policy, saved_search, search_state
from pydantic import BaseModel
from safetensors.torch import save_file

from deos_fx import reading
from deos_fx.contents import RECORD, write_record
from deos_fx.exporters.manifest import read_manifest
from deos_fx.policy.policy import ModelSignature, Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.schema import PolicyFile, ReductionEntry, TierEntry
from deos_fx.policy.tier import Tier
from deos_fx.reading import blaming, parse_json, read_json, read_tensors

ROOT = Path(__file__).resolve().parents[1]
CASES = 60


# *** schemas ***


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_published_schemas_are_up_to_date(name: str) -> None:
    text = (ROOT / f"docs/schemas/{name}.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(schemas.published(name)), (
        "write them again: .venv/bin/python tests/schemas.py docs/schemas"
    )


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_schemas_say_which_file_they_are_for(name: str) -> None:
    (kind,) = typing.get_args(schemas.SCHEMAS[name].model_fields["deos_fx"].annotation)
    assert kind == name
    folder = ROOT / "docs/schemas"
    assert {path.stem for path in folder.iterdir()} == {*schemas.SCHEMAS}


@pytest.mark.parametrize(("kind", "schema"), [(Reduction, ReductionEntry), (Tier, TierEntry)])
def test_fields_and_defaults_are_those_of_python(kind: Any, schema: type[BaseModel]) -> None:
    # A file has two names for the one amount of Python.
    assert [item.name for item in fields(kind)] == [x for x in schema.model_fields if x != "share"]
    for item in fields(kind):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        entry = schema.model_fields[item.name]
        if item.name == "keep":
            continue
        assert entry.is_required() == (default is MISSING)
        if not entry.is_required():
            assert entry.default == (list(default) if isinstance(default, tuple) else default)


# *** damage ***


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Change a few bytes, or leave some out, or repeat some."""
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice([1, 1, 2, 8, 64]))
    middle = data[start:end]
    change = chance.choice(["flip", "drop", "repeat", "zero", "digit", "cut"])
    if change == "flip":
        middle = bytes([middle[0] ^ (1 << chance.randrange(8))]) + middle[1:]
    elif change == "zero":
        middle = bytes(len(middle))
    elif change == "digit":
        middle = chance.choice([b"-", b"9" * 30, b"1e999", b"NaN", b"true", b"null", b"[", b"{}"])
    elif change == "cut":
        return data[:start]
    return data[:start] + middle * {"drop": 0, "repeat": 2}.get(change, 1) + data[end:]


def a_policy(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    path = folder / "policy.json"
    model = ModelSignature(model_type="a", vision_layers=2, decoder_layers=4, visual_tokens=64)
    steps = (
        *learned_policy(path).reductions,
        Reduction("decoder.1", 0.25, gain=0.5, temperature=0.1, tiers=(Tier(keep=0.5),)),
        Reduction("decoder.3", 4, selector="greedy", diversity=0.5, options={"at_once": 2}),
    )
    Policy(steps, name="damaged", model=model).save(path)
    return [path, path.with_suffix(".safetensors")], lambda: Policy.load(path)


def a_manifest(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    write_record(folder, WHOLE)
    return [folder / RECORD], lambda: read_manifest(folder)


def a_search(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    saved_search(folder)
    files = [folder / "search.json", folder / "step-3.safetensors"]
    return files, lambda: search_state().resume(folder)


@pytest.mark.parametrize("make", [a_policy, a_manifest, a_search])
def test_damage_ends_in_a_value_error_that_names_the_file(
    tmp_path: Path, make: Callable[[Path], tuple[list[Path], Callable[[], object]]]
) -> None:
    paths, read = make(tmp_path)
    read()
    whole = {path: path.read_bytes() for path in paths}
    refused = 0
    for seed in range(CASES):
        chance = random.Random(seed)
        path = chance.choice(paths)
        path.write_bytes(damaged(whole[path], chance))
        try:
            read()
        except FileNotFoundError as error:
            # Case: the record names another file of tensors, which is not there.
            assert str(tmp_path) in str(error)
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error)
        path.write_bytes(whole[path])
    assert refused > CASES // 2


# *** the parts ***


def test_names_and_depth() -> None:
    assert parse_json('{"a": [1, {"b": 2.5}]}') == {"a": [1, {"b": 2.5}]}
    deep = "[" * reading.JSON_DEPTH + "]" * reading.JSON_DEPTH
    parse_json(deep)
    for text in (f"[{deep}]", "[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested more than 32 deep"):
            parse_json(text)
    with pytest.raises(ValueError, match="the name 'a' is given twice"):
        parse_json('[{"a": 1, "b": 2, "a": 1}]')


def test_files_without_an_end_and_files_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_json("/dev/zero", 1000)
    path = tmp_path / "a.json"
    path.write_text("[" + " " * 998 + "]")
    assert read_json(path, 1000) == []
    with pytest.raises(ValueError, match="more than 999 bytes"):
        read_json(path, 999)


def test_tensors_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(9)}, path)
    assert torch.equal(read_tensors(path)["a"], torch.ones(9))
    monkeypatch.setattr(reading, "TENSOR_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.safetensors has \d+ bytes"):
        read_tensors(path)


class _Own(Exception):
    """One of the classes that packages have of their own."""


def test_others_that_fail_are_blamed_on_a_folder(tmp_path: Path) -> None:
    errors = (
        KeyError("weight_map"),
        RecursionError("deep"),
        AttributeError("no\nmodel"),
        AssertionError(),
        _Own("no " * 1000),
        RuntimeError(f"no\n{tmp_path}"),
    )
    for error in errors:
        name = type(error).__name__
        with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be loaded \({name}: ") as caught:
            with blaming(tmp_path):
                raise error
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    for kept in (
        OSError("no network"),
        torch.OutOfMemoryError("too large"),
        ImportError("torchao"),
        MemoryError("too large"),
    ):
        with pytest.raises(type(kept), match=str(kept)), blaming(tmp_path):
            raise kept
    with pytest.raises(OSError, match="^no network, try again$"), blaming(tmp_path):
        raise OSError("no network,\n\n  try again")
    with pytest.raises(ValueError, match="^known"), blaming(tmp_path):
        raise ValueError(f"known: {tmp_path}")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, None])
def test_the_damaged_file_of_a_folder_is_named(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "a.json").write_text("{}")
    path = tmp_path / "b.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} cannot be loaded"), blaming(tmp_path):
        raise KeyError


def test_messages_are_short_whatever_was_given() -> None:
    entry = {"site": "x" * 10_000, "keep": "y" * 10_000, "z" * 10_000: 1}
    data = {"deos_fx": "policy", "version": 1, "reductions": [entry] * 50}
    with pytest.raises(ValueError) as caught:
        reading.validated(PolicyFile, data)
    assert len(str(caught.value)) < 2000 and "and 147 more" in str(caught.value)
