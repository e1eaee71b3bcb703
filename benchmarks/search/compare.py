"""Compare searches at equal numbers of model evaluations.

    python -m benchmarks.search.compare --output benchmarks/results/search-cpu.json

Every search trains and selects on the same questions; its policy then answers test questions that
no search has seen. Results are written as they come, and a run that was stopped goes on where it
was: what the file has is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.common import conditions
from benchmarks.search.charts import comparison_chart
from benchmarks.search.methods import METHODS
from benchmarks.search.task import Task, load_task
from deos_fx.files import write_text

__all__ = ["Settings", "compare", "table"]

REFERENCE = "gradient"
"""The search whose number of evaluations the others get."""


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        task: The task.
        budgets: Shares of the visual tokens that may stay, mean over the decoder layers.
        seeds: Seeds of the questions and of the searches.
        methods: Names of `METHODS`; ``gradient`` first, if the file has no result of it.
        questions: Questions to train on; a third as many are held back to select by.
        tests: Test questions.
    """

    task: str = "reference"
    budgets: Sequence[float] = (0.056, 0.028, 0.125, 0.25)
    seeds: Sequence[int] = (0, 1, 2)
    methods: Sequence[str] = tuple(METHODS)
    questions: int = 384
    tests: int = 960


Run = dict[str, Any]


def compare(
    settings: Settings, task: Task, runs: list[Run], done: Callable[[list[Run]], None]
) -> list[Run]:
    """Run what is not among the runs yet.

    Args:
        settings: What to compare.
        task: The task.
        runs: Results so far; new ones are appended.
        done: Called with all results after each search.

    Returns:
        All results.

    Raises:
        ValueError: If a method is unknown, or evaluations are to be as many as those of a run that
            does not exist.
    """
    for name in settings.methods:
        if name not in METHODS:
            raise ValueError(f"no method {name!r}; choose from {', '.join(METHODS)}")
    for seed in settings.seeds:
        for budget in settings.budgets:
            for name in settings.methods:
                if _find(runs, settings, seed, budget, name) is None:
                    runs.append(_run(settings, task, runs, seed, budget, name))
                    done(runs)
    return runs


def _run(
    settings: Settings, task: Task, runs: list[Run], seed: int, budget: float, name: str
) -> Run:
    """Run one search and test its policy."""
    allowed = _find(runs, settings, seed, budget, REFERENCE)
    if allowed is None and name != REFERENCE:
        raise ValueError(f"{name} gets the evaluations of {REFERENCE}: run that first")
    whole = task.model.config.image_seq_length
    # A problem of its own, so that its counter holds this search alone.
    problem = task.problem(max(1, round(budget * whole)), settings.questions, seed)
    began = time.perf_counter()
    found = METHODS[name](problem, seed, allowed["evaluations"] if allowed else None)
    seconds = time.perf_counter() - began
    evaluations = problem.effort.evaluations
    return {
        **_key(settings, seed, budget, name),
        "tests": settings.tests,
        "tokens": problem.limits["visual_tokens"],
        "evaluations": evaluations,
        "seconds": seconds,
        "loss": found.loss,
        "right": task.accuracy(found.policy, settings.tests),
        "policy": [str(reduction) for reduction in found.policy.reductions],
        "trace": found.trace,
    }


def _key(settings: Settings, seed: int, budget: float, name: str) -> Run:
    """Return what tells one result from another."""
    return {
        "task": settings.task,
        "questions": settings.questions,
        "budget": budget,
        "seed": seed,
        "method": name,
    }


def _find(
    runs: Sequence[Run], settings: Settings, seed: int, budget: float, name: str
) -> Run | None:
    """Return the result of a search, if there is one."""
    key = _key(settings, seed, budget, name)
    return next((run for run in runs if key.items() <= run.items()), None)


# *** the table and the command ***


def table(runs: Sequence[Run]) -> str:
    """Return a table in Markdown: right answers in per cent, mean and range over the seeds.

    In brackets: the mean number of evaluations.
    """
    budgets = sorted({run["budget"] for run in runs}, reverse=True)
    methods = [name for name in METHODS if any(run["method"] == name for run in runs)]
    lines = [
        "| search | " + " | ".join(f"{100 * budget:.3g} %" for budget in budgets) + " |",
        "| --- |" + " --- |" * len(budgets),
    ]
    for name in methods:
        cells = [
            _cell([run for run in runs if (run["method"], run["budget"]) == (name, budget)])
            for budget in budgets
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: Sequence[Run]) -> str:
    """Return mean, range and evaluations of the runs of a method at a budget."""
    if not runs:
        return "-"
    right = [100 * run["right"]["overall"] for run in runs]
    evaluations = sum(run["evaluations"] for run in runs) / len(runs)
    spread = f" ({min(right):.1f} to {max(right):.1f})" if len(right) > 1 else ""
    return f"{sum(right) / len(right):.1f}{spread} [{evaluations:.0f}]"


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    budgets: Annotated[
        str, typer.Option(help="Shares of the visual tokens, with commas between.")
    ] = ",".join(map(str, Settings.budgets)),
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="Searches, with commas between.")] = ",".join(
        METHODS
    ),
    questions: Annotated[
        int, typer.Option(min=3, help="Questions to train on; a third as many are held back.")
    ] = Settings.questions,
    tests: Annotated[int, typer.Option(min=1, help="Test questions.")] = Settings.tests,
    task: Annotated[str, typer.Option(help="reference or garments.")] = Settings.task,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Photographs for garments.")
    ] = None,
) -> None:
    """Compare searches at equal numbers of model evaluations."""
    transformers_logging.disable_progress_bar()
    console = Console()
    settings = Settings(
        task=task,
        budgets=[float(budget) for budget in budgets.split(",")],
        seeds=[int(seed) for seed in seeds.split(",")],
        methods=methods.split(","),
        questions=questions,
        tests=tests,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"runs": []}
    record |= conditions("search", asdict(settings), torch.device("cpu"))

    def done(runs: list[Run]) -> None:
        write_text(output, json.dumps(record | {"runs": runs}, indent=1) + "\n")
        last = runs[-1]
        console.print(
            f"{last['budget']} seed {last['seed']} {last['method']}: {last['right']['overall']:.1%}"
            f" right, loss {last['loss']:.4f}, {last['evaluations']} evaluations,"
            f" {last['seconds']:.0f} s",
            highlight=False,
        )

    try:
        runs = compare(settings, load_task(task, data), record["runs"], done)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(table(runs), highlight=False, soft_wrap=True)
    chart = output.with_suffix(".svg")
    write_text(chart, comparison_chart(runs))
    console.print(f"Wrote {output} and {chart}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
