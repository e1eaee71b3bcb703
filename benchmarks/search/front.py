"""Search several budgets together and one by one: what each costs, and how good it is.

    python -m benchmarks.search.front --output benchmarks/results/front-cpu.json

What the budgets of a front share counts for the first of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.common import conditions
from benchmarks.search.task import Task, load_task
from deos_fx import search
from deos_fx.files import write_text
from deos_fx.policy.budget import Budget
from deos_fx.results.search_result import SearchResult

__all__ = ["Settings", "measure", "table"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to search.

    Attributes:
        budgets: Numbers of visual tokens that may stay, mean over the decoder layers.
        seed: Seed of the questions and of the searches.
        questions: Questions to train on; a third as many are held back.
        tests: Test questions.
        steps: Gradient steps at the best place; as many as a search takes, if None.
    """

    budgets: Sequence[int] = (36, 18, 8, 4)
    seed: int = 0
    questions: int = 384
    tests: int = 960
    steps: int | None = None


def measure(task: Task, settings: Settings) -> list[Row]:
    """Search together, then one by one.

    Returns:
        A row for each budget and way: evaluations, loss and right answers in per cent.
    """
    budgets = [Budget(visual_tokens=tokens) for tokens in settings.budgets]
    data = task.data(settings.questions, settings.seed)
    options: dict[str, Any] = {"steps": settings.steps, "seed": settings.seed}
    start = time.perf_counter()
    together = search(task.model, data, budgets=budgets, **options)
    seconds = time.perf_counter() - start
    rows = [
        _row(task, settings, "together", result) | {"seconds_of_all": seconds}
        for result in together.results.values()
    ]
    for budget in budgets:
        start = time.perf_counter()
        result = search(task.model, data, budget=budget, **options)
        seconds = time.perf_counter() - start
        rows.append(_row(task, settings, "one by one", result) | {"seconds": seconds})
    return rows


def _row(task: Task, settings: Settings, way: str, result: SearchResult) -> Row:
    right = task.accuracy(result.policy, settings.tests)
    return {
        "way": way,
        "tokens": result.limits["visual_tokens"],
        "evaluations": result.evaluations,
        "loss": result.best.loss,
        "source": result.best.source,
        "right": 100 * right["overall"],
        "policy": [str(reduction) for reduction in result.policy.reductions],
    }


def table(rows: Sequence[Row]) -> str:
    """Return a table in Markdown."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    budgets = sorted({row["tokens"] for row in rows}, reverse=True)
    lines = [
        "| | " + " | ".join(f"{tokens:.3g} tokens" for tokens in budgets) + " | evaluations |",
        "| --- |" + " --- |" * (len(budgets) + 1),
    ]
    for way in ways:
        own = {row["tokens"]: row for row in rows if row["way"] == way}
        cells = [f"{own[tokens]['right']:.1f}" if tokens in own else "-" for tokens in budgets]
        total = sum(row["evaluations"] for row in own.values())
        lines.append(f"| {way} | {' | '.join(cells)} | {total:,} |")
    return "\n".join(lines)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    budgets: Annotated[str, typer.Option(help="Visual tokens, with commas between.")] = ",".join(
        map(str, Settings.budgets)
    ),
    seed: Annotated[int, typer.Option(help="Seed.")] = Settings.seed,
    questions: Annotated[
        int, typer.Option(min=3, help="Questions to train on; a third as many are held back.")
    ] = Settings.questions,
    tests: Annotated[int, typer.Option(min=1, help="Test questions.")] = Settings.tests,
    steps: Annotated[int | None, typer.Option(min=1, help="Gradient steps.")] = None,
) -> None:
    """Search several budgets together and one by one."""
    transformers_logging.disable_progress_bar()
    tokens = [int(each) for each in budgets.split(",")]
    settings = Settings(tokens, seed, questions, tests, steps)
    rows = measure(load_task("reference"), settings)
    record = conditions("front", asdict(settings), torch.device("cpu")) | {"rows": rows}
    write_text(output, json.dumps(record, indent=1) + "\n")
    console = Console()
    console.print(table(rows), highlight=False, soft_wrap=True)
    console.print(f"Wrote {output}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
