"""Ablations of the search, each with a plot.

    python -m benchmarks.search.ablations gates --output benchmarks/results/ablation-gates.json

Each takes some minutes on one core. Results are written as they come, and a run that was stopped
goes on where it was: what the file has is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.common import conditions
from benchmarks.search.cases import CASES, Row, Settings
from benchmarks.search.charts import bars_chart, lines_chart
from benchmarks.search.task import Task, load_task
from deos_fx.files import write_text

__all__ = ["PLOTS", "ablate", "table"]


def ablate(
    name: str, task: Task, settings: Settings, rows: list[Row], done: Callable[[list[Row]], None]
) -> list[Row]:
    """Run the cases of an ablation that are not among the rows yet.

    Args:
        name: One of `CASES`.
        task: The task.
        settings: The settings.
        rows: Results so far; new ones are appended.
        done: Called with all results after each case.

    Returns:
        All results.

    Raises:
        ValueError: If there is no such ablation.
    """
    if name not in CASES:
        raise ValueError(f"no ablation {name!r}; choose from {', '.join(CASES)}")
    for case in CASES[name](task, settings):
        key = {"name": case.name, "at": case.at, "seed": case.seed}
        if not any(key.items() <= row.items() for row in rows):
            rows.append(key | case.run())
            done(rows)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return a table in Markdown: means over the seeds, and the range of right answers."""
    lines = ["| | at | right, % | range | loss |", "| --- | --- | --- | --- | --- |"]
    for name, at in dict.fromkeys((row["name"], row["at"]) for row in rows):
        found = [row for row in rows if (row["name"], row["at"]) == (name, at)]
        right = [row["right"] for row in found]
        loss = sum(row["loss"] for row in found) / len(found)
        lines.append(
            f"| {name} | {at} | {sum(right) / len(right):.1f} | {min(right):.1f} to "
            f"{max(right):.1f} | {loss:.3f} |"
        )
    return "\n".join(lines)


# *** the plots ***


def _bars(rows: Sequence[Row]) -> str:
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        groups.setdefault(str(row["at"]), {}).setdefault(row["name"], []).append(row["right"])
    return bars_chart(groups, "right answers, %")


def _lines(x_label: str) -> Callable[[Sequence[Row]], str]:
    def draw(rows: Sequence[Row]) -> str:
        points: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            points.setdefault(row["name"], {}).setdefault(row["at"], []).append(row["right"])
            if "start" in row:
                starts = points.setdefault("before the steps", {})
                starts.setdefault(row["at"], []).append(row["start"])
        series = {name: sorted(found.items()) for name, found in points.items()}
        return lines_chart(series, x_label, "right answers, %", logarithmic=True)

    return draw


def _curves(rows: Sequence[Row]) -> str:
    points: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        for step, soft, static in row["curve"]:
            for kind, loss in (("relaxed", soft), ("static", static)):
                points.setdefault(f"{row['name']} gates, {kind}", {}).setdefault(step, []).append(
                    loss
                )
    series = {name: sorted(found.items()) for name, found in points.items()}
    return lines_chart(series, "step", "loss on held-back data")


def _matrix(rows: Sequence[Row]) -> str:
    points: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        for tokens, right in row["at_budgets"].items():
            points.setdefault(row["name"], {}).setdefault(float(tokens), []).append(right)
    series = {name: sorted(found.items()) for name, found in points.items()}
    return lines_chart(series, "visual tokens that stay", "right answers, %", logarithmic=True)


PLOTS: Mapping[str, Callable[[Sequence[Row]], str]] = dict.fromkeys(CASES, _bars) | {
    "gap": _curves,
    "steps": _lines("gradient steps"),
    "examples": _lines("questions to search with"),
    "transfer": _matrix,
}
"""Name of an ablation -> its plot."""


# *** the command ***


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(CASES)}.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0,1,2",
    questions: Annotated[
        int, typer.Option(min=3, help="Questions to train on; a third as many are held back.")
    ] = Settings.questions,
    tests: Annotated[int, typer.Option(min=1, help="Test questions.")] = Settings.tests,
    tokens: Annotated[int, typer.Option(min=1, help="Visual tokens.")] = Settings.tokens,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps; default: those of a search.")
    ] = None,
) -> None:
    """Run an ablation of the search, and draw it."""
    transformers_logging.disable_progress_bar()
    console = Console()
    settings = Settings([int(seed) for seed in seeds.split(",")], questions, tests, tokens, steps)
    path = output or Path(f"benchmarks/results/ablation-{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    record |= conditions(f"ablation {name}", asdict(settings), torch.device("cpu"))

    def done(rows: list[Row]) -> None:
        write_text(path, json.dumps(record | {"rows": rows}, indent=1) + "\n")
        last = rows[-1]
        console.print(
            f"{last['name']}, {last['at']}, seed {last['seed']}: {last['right']:.1f} % right, "
            f"loss {last['loss']:.4f}",
            highlight=False,
        )

    try:
        rows = ablate(name, load_task("reference"), settings, record["rows"], done)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(table(rows), highlight=False, soft_wrap=True)
    chart = path.with_suffix(".svg")
    write_text(chart, PLOTS[name](rows))
    console.print(f"Wrote {path} and {chart}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
