"""The command ``deos-fx example``: a small model and questions, to try the other commands on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deos_fx.cli.console import report_console
from deos_fx.cli.options import Force
from deos_fx.cli.outputs import check_target

if TYPE_CHECKING:
    from deos_fx.reference.scenes import Split

__all__ = ["example"]


def example(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")] = Path(
        "example"
    ),
    questions: Annotated[int, typer.Option(min=1, help="Lines of each file of questions.")] = 256,
    force: Force = False,
) -> None:
    """Write a small trained model and questions about images, to try the other commands on.

    model is a LLaVA of 2.6 million parameters; questions.jsonl is for search, and test.jsonl, with
    other images, for eval and compare. All commands run on them in seconds or a few minutes.

    [bold]Examples[/]

      deos-fx example

      deos-fx search example/model --data example/questions.jsonl --steps 20
    """
    check_target(folder, force)
    from deos_fx.files import fresh_folder
    from deos_fx.reference import WEIGHTS

    with fresh_folder(folder) as fresh:
        shutil.copytree(WEIGHTS, fresh / "model")
        (fresh / "images").mkdir()
        _write_questions(fresh, "questions", questions, "train")
        _write_questions(fresh, "test", questions, "test")
    console = report_console()
    console.print(f"Wrote {folder}. Try:", highlight=False)
    for line in (
        f"deos-fx inspect {folder}/model --preset merge",
        f"deos-fx data {folder}/questions.jsonl --model {folder}/model",
        f"deos-fx search {folder}/model --data {folder}/questions.jsonl --output found",
        f"deos-fx eval {folder}/model --data {folder}/test.jsonl --policy found",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _write_questions(folder: Path, name: str, count: int, split: Split) -> None:
    from deos_fx.reference import make_examples

    lines = []
    for number, one in enumerate(make_examples(count, split), start=1):
        image = f"images/{name}-{number}.png"
        one.scene.image.save(folder / image)
        asked = one.question
        row = {"prompt": asked.text, "answer": asked.answer, "kind": asked.kind}
        lines.append(json.dumps({"image": image, **row}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
