"""What calls of minutes show: bars on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from deos_fx import compare, export_onnx, search
from deos_fx.progress import Progress, shows_progress


@shows_progress
def work(amount: int, *, progress: Progress | None = None) -> int:
    """Work."""
    assert progress is not None
    for done in range(1, amount + 1):
        progress("steps", done, amount)
        if done == 1:
            progress("estimate", 3, 90)
    return amount


def test_the_given_progress_is_called() -> None:
    told: list[tuple[str, int, int]] = []
    assert work(2, progress=lambda *what: told.append(what)) == 2
    assert told == [("steps", 1, 2), ("estimate", 3, 90), ("steps", 2, 2)]


def test_bars_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # rich takes the output for a terminal then, which it would colour.
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert work(2) == 2
    output = capsys.readouterr()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.err)
    assert "steps" in shown and "2/2" in shown and "about 87 seconds more" in shown
    assert output.out == ""


def test_a_line_for_each_stage_in_the_log_elsewhere(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="deos_fx"):
        work(2)
    assert [record.message for record in caplog.records] == [
        "about 87 seconds more",
        "steps: 2 done",
    ]
    assert capsys.readouterr() == ("", "")


def test_one_of_several_processes_shows_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO, logger="deos_fx"):
        work(2)
    assert not caplog.records


@pytest.mark.parametrize("call", [search, compare, export_onnx])
def test_calls_of_minutes_show_it(call: Callable[..., Any]) -> None:
    assert inspect.signature(call).parameters["progress"].default is None
    assert inspect.unwrap(call) is not call
