"""The command ``check``, and folders that other commands find incomplete or damaged."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tiny import tiny_llava
from typer.testing import CliRunner

from deos_fx import Policy, ReducedModel, reference
from deos_fx.cli.app import app
from deos_fx.cli.loading import load_generating
from deos_fx.cli.policies import Choice
from deos_fx.contents import RECORD, record_of, write_record

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "saved"
    ReducedModel(tiny_llava(1), Policy()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "reduced").mkdir()
    for path in saved.iterdir():
        (tmp_path / "reduced" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "reduced"


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_whole_folder(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    lines = {line.split()[0]: line for line in run("check", folder).splitlines()}
    for name in ("config.json", "generation_config.json", "model.safetensors", "policy.json"):
        assert lines[name].split()[-1] == "ok"
    assert lines["notes.txt"].strip().endswith("not in the record")
    assert f"{(folder / 'model.safetensors').stat().st_size:,}" in lines["model.safetensors"]


def test_damage_is_found_however_large_the_files_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deos_fx.contents.HASHED_BYTES", 0)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (folder / "generation_config.json").unlink()
    text = run("check", folder, code=1)
    assert "is not the file that was written" in text and "is missing" in text
    assert text.split().count("ok") == 2


@pytest.mark.parametrize("kind", ["reduced_model", "onnx", "genai"])
def test_files_that_would_be_read_besides_are_found(kind: str, tmp_path: Path) -> None:
    write_record(tmp_path, {"deos_fx": kind})
    run("check", tmp_path)
    (tmp_path / "policy.safetensors").write_text("")
    text = run("check", tmp_path, code=1)
    assert "not written with the others and would be read with" in " ".join(text.split())


@posix
def test_names_of_files_do_not_command_the_terminal(folder: Path) -> None:
    (folder / "a\x1b[31m\x07\x9b.txt").write_text("")
    (folder / ".deos-fx-\x1b]0;").mkdir()
    text = run("check", folder, "--clean")
    assert "a\u241b[31m\ufffd.txt" in text.replace("\u2407", "") and ".deos-fx-\u241b]0;" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    text = run("data", folder / "none.jsonl", "--model", folder / "\x1b[31m", code=1)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "has no deos_fx.json; give a folder that"),
        ("{", "deos_fx.json is damaged"),
        ('{"deos_fx": "incomplete"}', "is incomplete: what replaced its files was stopped"),
        ('{"deos_fx": "reduced_model", "version": 1}', "cannot be checked: an earlier version"),
    ],
)
def test_folders_that_cannot_be_checked(record: str | None, message: str, folder: Path) -> None:
    (folder / RECORD).unlink()
    if record is not None:
        (folder / RECORD).write_text(record)
    assert message in run("check", folder, code=1)


def test_clean_removes_what_killed_commands_have_left(folder: Path) -> None:
    for place in (folder, folder.parent):
        (place / ".deos-fx-12345678" / "new").mkdir(parents=True)
    assert "Removed" not in run("check", folder)
    assert run("check", folder, "--clean").count("Removed") == 2
    assert not [*folder.parent.rglob(".*")]
    (folder.parent / ".deos-fx-12345678").mkdir()
    assert "Removed" in run("check", "--clean", folder.parent)
    assert "there is no folder" in run("check", "--clean", folder / "none", code=1)


def test_other_commands_refuse_damaged_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    for options in ((), ("--preset", "merge")):
        text = run("transform", folder, tmp_path / "out", *options, code=1)
        assert "config.json has" in text and "is damaged" in text
    (folder / RECORD).write_text(json.dumps({"deos_fx": "incomplete"}))
    text = run("transform", folder, tmp_path / "out", "--preset", "merge", code=1)
    assert "is incomplete" in text and not (tmp_path / "out").exists()
    assert "is incomplete" in run("inspect", folder, code=1)


def test_an_export_without_a_graph_is_no_reduced_model(tmp_path: Path) -> None:
    (tmp_path / "prefill.onnx").write_text("")
    write_record(tmp_path, {"deos_fx": "onnx", **dict.fromkeys(("version", "opset"), 4)})
    (tmp_path / "prefill.onnx").unlink()
    with pytest.raises(ValueError, match="is not the manifest of an export"):
        load_generating(str(tmp_path), Choice())


def test_transform_records_the_processor_as_well(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    # Of another model, which had been written there; and a file of the user.
    (tmp_path / "out" / "chat_template.jinja").write_text("")
    write_record(tmp_path / "out", {"deos_fx": "reduced_model"})
    (tmp_path / "out" / "mine.jinja").write_text("")
    run("transform", reference.WEIGHTS, tmp_path / "out", "--preset", "merge", "--force")
    (tmp_path / "out" / "mine.jinja").unlink()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "chat_template.jinja" not in names
    assert {*record_of(tmp_path / "out")["files"]} == names - {RECORD}
    assert "tokenizer.json" in names
    run("check", tmp_path / "out")


def test_names_that_are_taken_are_found_before_the_work(
    folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deos_fx.cli.loading.load_model", lambda _: pytest.fail("worked before"))
    monkeypatch.setattr("deos_fx.cli.loading.load_reduced", lambda *_: pytest.fail("worked before"))
    (tmp_path / "out" / "policy.json").mkdir(parents=True)
    for arguments in (
        ("transform", folder, tmp_path / "out"),
        ("export", folder, tmp_path / "out"),
        ("search", folder, "--data", questions, "--output", tmp_path / "out"),
    ):
        assert "policy.json: it is a folder" in run(*arguments, "--force", code=1)


@pytest.mark.parametrize(
    ("command", "option"),
    [("eval", "--output"), ("profile", "--output"), ("inspect", "--svg")],
)
def test_files_that_cannot_be_written_are_found_before_the_work(
    command: str, option: str, folder: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deos_fx.cli.loading._saved", lambda _: pytest.fail("worked before"))
    monkeypatch.setattr("deos_fx.cli.loading._config", lambda _: pytest.fail("worked before"))
    data = ("--data", questions) if command == "eval" else ()
    text = run(command, folder, *data, option, folder / "none" / "file", code=1)
    assert "cannot write the file" in text and "No such file or directory" in text
    text = run(command, folder, *data, option, folder / "config.json", code=1)
    assert "exists; add --force to overwrite it" in text
