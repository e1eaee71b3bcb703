"""The command ``deos-fx demo``: everything once, on the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deos_fx.cli.console import report_console
from deos_fx.cli.options import Force, OutputOption, TokenLimit
from deos_fx.cli.outputs import check_target

__all__ = ["demo"]


def demo(
    output: OutputOption = Path("deos-fx-demo"),
    budget: TokenLimit = "12.5%",
    seed: Annotated[int, typer.Option(help="Seed of the search and its scenes.")] = 0,
    force: Force = False,
) -> None:
    """Search, compare, export and run a small trained model, and write a report.

    Takes a few minutes on two cores and needs no network. Writes
    policy.json, the ONNX files, results.json and report.html.

    [bold]Examples[/]

      deos-fx demo

      deos-fx demo --output my-demo --budget 0.25
    """
    check_target(output, force)
    from deos_fx.cli.demo import run_demo

    run_demo(output, budget, seed, report_console())
