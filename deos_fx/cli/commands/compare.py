"""The command ``deos-fx compare``: policies beside presets at the same budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deos_fx.cli.console import report_console
from deos_fx.cli.options import (
    Device,
    Dtype,
    Evaluations,
    Force,
    Model,
    OutputOption,
    PolicyFiles,
    Presets,
    TestFile,
    TokenLimit,
    TuneFile,
    Urls,
)
from deos_fx.cli.outputs import check_target

__all__ = ["compare"]

_TIME = "The comparison will take about {} more; fewer --evaluations or --seeds make it shorter."


def compare(
    model_dir: Model,
    test: TestFile,
    tune: TuneFile = None,
    output: OutputOption = Path("deos-fx-compare"),
    budget: TokenLimit = None,
    policy: PolicyFiles = None,
    preset: Presets = None,
    evaluations: Evaluations = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of what is random.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    urls: Urls = False,
) -> None:
    """Compare policies with presets at the same budget, and with the unreduced model.

    Presets, random and uniform pruning among them, are fitted to the budget and,
    with --tune, tuned (pip install 'deos-fx\\[compare]'). Without --budget, they may
    leave as many visual tokens as the policies do, and 12.5 % without policies. Also
    resizes the image to as few tokens where the model allows it, and leaves it out.
    Answers count as right if they are exactly the given ones. Writes
    comparison.html, .csv, .json and plots.

    [bold]Examples[/]

      deos-fx compare my-llava --test test.jsonl --policy found/policy.json

      deos-fx compare my-llava --test test.jsonl --tune questions.jsonl --evaluations 100

    A line of test.jsonl:

      {"image": "images/1.png", "prompt": "What is this?", "answer": "A cat", "kind": "what"}
    """
    check_target(output, force, model_dir)
    from deos_fx.cli.limits import limit_beside
    from deos_fx.cli.loading import checked_processor, load_model
    from deos_fx.cli.policies import named_policies
    from deos_fx.cli.terminal import announced, comparison_table, stages
    from deos_fx.comparison.answers import exact_match
    from deos_fx.comparison.compare import check_names, check_questions
    from deos_fx.comparison.compare import compare as run_comparison
    from deos_fx.data import read_records
    from deos_fx.files import fresh_folder

    # Mistakes in the files show before the model is loaded.
    console, policies = report_console(), named_policies(policy or [])
    records = read_records(test, urls=urls)
    tuning = None if tune is None else read_records(tune, urls=urls)
    check_names(preset or [], policies)
    check_questions(records, tuning, exact_match)
    with fresh_folder(output, ("comparison.*",)) as folder:
        with stages(console) as stage:
            with stage("load"):
                processor = checked_processor(model_dir)
                model = load_model(model_dir, dtype=dtype, device=device)
            with stage.phased("compare") as progress:
                result = run_comparison(
                    model,
                    processor,
                    records,
                    budget=limit_beside(policies, budget),
                    policies=policies,
                    tuning=tuning,
                    presets=preset,
                    evaluations=evaluations,
                    seeds=seeds,
                    batch_size=batch_size,
                    progress=announced(progress, console, _TIME),
                )
        # Shown first: a disk may be full.
        console.print_figures(comparison_table(result))
        for row in result.left_out:
            console.print(f"{row.name}: {row.reason}", highlight=False, markup=False)
        result.save(folder)
    console.print(f"Wrote {output / 'comparison.html'}", highlight=False)
