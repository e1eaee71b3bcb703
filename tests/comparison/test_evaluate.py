"""Evaluations: what policies answer and cost, with and without answers in the data."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_cases import fails, run

from deos_fx import Budget, Comparison, ReducedModel, presets, reference
from deos_fx.cli.console import Console
from deos_fx.cli.terminal import evaluation_table
from deos_fx.comparison.answers import generated
from deos_fx.comparison.compare import evaluate
from deos_fx.data import Record
from deos_fx.errors import Undivided

MERGE = presets.merge(keep=4)


@pytest.fixture(scope="module", name="asked")
def _asked() -> Any:
    return reference.make_examples(8, "test")


@pytest.fixture(scope="module", name="records")
def _records(asked: Any) -> list[Record]:
    found = [Record(x.scene.image, x.question.text, x.question.answer) for x in asked]
    # What the model says is not what counts as right here.
    return [replace(record, answer="none") for record in found[:2]] + found[2:]


@pytest.fixture(scope="module", name="loaded")
def _loaded() -> Any:
    return reference.load()


@pytest.fixture(scope="module", name="result")
def _result(loaded: Any, records: list[Record]) -> Comparison:
    return evaluate(
        *loaded,
        records,
        policies={"mine": MERGE},
        presets=["fastv"],
        budget=Budget(visual_tokens=18),
    )


def answers(generate: Any, processor: Any, asked: Any) -> list[str]:
    (batch,) = reference.batches(processor, asked, len(asked), answers=False)
    ids = generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def test_answers_and_agreement(
    result: Comparison, loaded: Any, asked: Any, records: list[Record]
) -> None:
    model, processor = loaded
    assert [row.name for row in result.rows] == ["no reduction", "mine", "fastv"]
    whole = answers(model.generate, processor, asked)
    mine = answers(ReducedModel(model, MERGE).generate, processor, asked)
    same = [ours == theirs for ours, theirs in zip(mine, whole, strict=True)]
    right = [ours == record.answer for ours, record in zip(mine, records, strict=True)]
    # Neither all nor none, and not the same ones.
    assert 0 < sum(same) < 8 and same != right
    row = result.row("mine")
    assert result.agreement(row) == sum(same) / 8
    assert result.accuracy(row).mean == sum(right) / 8
    assert result.agreement(result.unreduced) == 1


def test_a_batch_that_cannot_be_divided_is_answered_one_by_one(
    loaded: Any, records: list[Record]
) -> None:
    model, processor = loaded
    sizes: list[int] = []

    def generate(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise Undivided("some input fits no count of images")
        return model.generate(**inputs)

    how = {"batch_size": 2, "max_new_tokens": 4}
    one_by_one = generated(generate, model, processor, records[:3], **how)
    assert one_by_one == generated(model.generate, model, processor, records[:3], **how)
    assert sizes == [2, 1, 1, 1]


def test_costs_are_measured(result: Comparison) -> None:
    whole, mine = result.unreduced, result.row("mine")
    assert (whole.visual_tokens, mine.visual_tokens) == (144, 4)
    assert mine.flops < whole.flops and mine.kv_bytes < whole.kv_bytes
    assert all(row.milliseconds > 0 for row in result.rows)
    # A call may fit into memory that the process has already.
    assert all(row.peak_bytes is None or row.peak_bytes >= 0 for row in result.rows)


def test_the_table_loses_nothing_in_a_narrow_terminal(result: Comparison) -> None:
    console = Console(file=io.StringIO(), width=50)
    console.print_figures(evaluation_table(result))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(row.name in shown for row in result.rows)
    assert "MiB" in shown and "\u2026" not in shown


def test_questions_without_answers(loaded: Any, records: list[Record], result: Comparison) -> None:
    bare = [replace(record, answer=None) for record in records]
    found = evaluate(*loaded, bare, policies={"mine": MERGE}, max_new_tokens=4)
    assert not found.answered
    assert found.agreement(found.row("mine")) == result.agreement(result.row("mine"))
    mine = found.to_dict()["methods"][1]
    assert mine["agreement"] == found.agreement(found.row("mine")) and "accuracy" not in mine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presets": ["fastv"]}, "presets are fitted to a budget"),
        ({"budget": Budget(flops=0.5)}, "limit these and no other"),
        ({"presets": ["no"], "budget": Budget(visual_tokens=9)}, "no preset 'no'"),
        ({"policies": {"no reduction": MERGE}}, "as another row is"),
    ],
)
def test_what_is_refused(loaded: Any, records: list[Record], options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(*loaded, records, **options)


def test_some_answers_are_refused(loaded: Any, records: list[Record]) -> None:
    some = [records[0], replace(records[1], answer=None)]
    with pytest.raises(ValueError, match="no answer to 1 of 2 questions of the test data"):
        evaluate(*loaded, some)
    with pytest.raises(ValueError, match="the test data is empty"):
        evaluate(*loaded, [])


# *** the command ***


def test_the_command(questions: Path, tmp_path: Path, loaded: Any) -> None:
    model, processor = loaded
    reduced = ReducedModel(model, MERGE)
    reduced.save_pretrained(tmp_path / "reduced")
    processor.save_pretrained(tmp_path / "reduced")
    (tmp_path / "found").mkdir()
    presets.merge(keep=9).save(tmp_path / "found" / "policy.json")
    out = tmp_path / "out.json"
    text = run(
        "eval",
        tmp_path / "reduced",
        *("--data", questions, "--policy", tmp_path / "found", "--output", out),
    )
    found = json.loads(out.read_text())
    methods = {method["method"]: method["visual_tokens"] for method in found["methods"]}
    assert methods == {"no reduction": 144, "merge": 4, "policy": 9}
    assert "right, %" in text and "same, %" in text and "3 questions" in text


def test_the_command_says_what_is_missing(questions: Path, tmp_path: Path) -> None:
    options = ("eval", reference.WEIGHTS, "--data", questions)
    assert "there is no policy.json in" in fails(*options, "--policy", tmp_path)
    assert "--budget needs a method" in fails(*options, "--budget", "0.5")
