"""The command ``deos-fx eval``: what a policy answers and costs on a file of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deos_fx.cli.console import Console, report_console
from deos_fx.cli.options import (
    DataFile,
    Device,
    Dtype,
    Force,
    Model,
    PolicyFiles,
    TokenLimit,
    Urls,
)
from deos_fx.cli.outputs import check_target_file

__all__ = ["evaluate"]


def evaluate(
    model_dir: Model,
    data: DataFile,
    policy: PolicyFiles = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A preset; may be given several times."),
    ] = None,
    budget: TokenLimit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer. Default: from the data, or 32.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="JSON to write: all figures and answers."
        ),
    ] = None,
    urls: Urls = False,
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
) -> None:
    """Measure a policy on your data: answers, agreement, cost, time and memory.

    The unreduced model answers the same questions. Right is an answer that is
    exactly the given one; without answers in the data, only the agreement with
    the unreduced model is known. MODEL_DIR may be a folder that transform
    wrote; its policy is measured then. --policy takes a file, or the folder of
    a search. Costs, time and memory are those of the first question's prefill.

    [bold]Examples[/]

      deos-fx eval reduced --data test.jsonl

      deos-fx eval my-llava --data test.jsonl --policy found

      deos-fx eval my-llava --data test.jsonl --preset fastv --budget 12.5%
    """
    if output is not None:
        check_target_file(output, force)
    from deos_fx.cli.limits import limit_beside
    from deos_fx.cli.loading import checked_processor, load_unreduced
    from deos_fx.cli.policies import named_policies
    from deos_fx.cli.terminal import evaluation_table, stages
    from deos_fx.comparison.compare import Given, check_names
    from deos_fx.comparison.compare import evaluate as run_evaluation
    from deos_fx.data import read_records
    from deos_fx.files import write_text

    # Mistakes in the files show before the model is loaded.
    console = Console()
    policies: dict[str, Given] = {**named_policies(policy or [])}
    if budget is not None and not preset:
        raise ValueError("--budget needs a method to fit to it; give --preset as well")
    records = read_records(data, urls=urls)
    check_names(preset or [], policies)
    with stages(report_console()) as stage:
        with stage("load"):
            processor = checked_processor(model_dir)
            model, own = load_unreduced(model_dir, dtype=dtype, device=device)
            policies |= own
        with stage.phased("evaluate") as progress:
            result = run_evaluation(
                model,
                processor,
                records,
                policies=policies,
                presets=preset or [],
                budget=limit_beside(policies, budget),
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
    console.print_figures(evaluation_table(result))
    for row in result.left_out:
        console.print(f"{row.name}: {row.reason}", highlight=False, markup=False)
    if output is not None:
        write_text(output, json.dumps(result.to_dict(), indent=2) + "\n")
        report_console().print(f"Wrote {output}", highlight=False)
