"""The command ``deos-fx search``: a policy for a model and a budget, found on your own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deos_fx.cli.console import report_console
from deos_fx.cli.options import (
    DataFile,
    Device,
    Dtype,
    Force,
    Model,
    OtherLimit,
    OutputOption,
    TokenLimits,
    Urls,
)
from deos_fx.cli.outputs import check_target

__all__ = ["search"]


def search(
    model_dir: Model,
    data: DataFile,
    output: OutputOption = Path("deos-fx-search"),
    budget: TokenLimits = None,
    flops: OtherLimit = None,
    kv_cache: OtherLimit = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of the prefill, measured on this machine.")
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured elsewhere, by deos-fx profile."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Gradient steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Order of the questions and of the batches.")] = 0,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE",
            help="A site to consider, as inspect names it; may be given several times. "
            "Default: the projector and the decoder.",
        ),
    ] = None,
    image_scale: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SCALE",
            help="A scale at which images may enter, in (0, 1]; may be given several times. 1 is "
            "tried as well.",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    preset_evaluations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Losses that tuning presets may take, to compare with; 0 for published settings. "
            "Default: 48, if Optuna is installed.",
        ),
    ] = None,
    force: Force = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the search here, and continue the one found here."),
    ] = None,
    urls: Urls = False,
) -> None:
    """Search a policy for a model and a budget, on your own data.

    With answers the search minimises their loss; without, it stays close to
    the answers of the unreduced model. At the end, presets are tuned on the same
    data, and questions that were held back are answered with the policy, with the
    best preset and without reduction. Ctrl-C ends it early with the best policy
    so far. Writes policy.json and report.html. Without any limit the budget
    is 12.5 % of the visual tokens. Several budgets are searched in one go, and
    policy-0.25.json, ... are written. Several processes share the work if
    accelerate launches them.

    [bold]Examples[/]

      deos-fx search my-llava --data questions.jsonl --budget 12.5%

      deos-fx search my-llava --data questions.jsonl --flops 0.5 --output found

      deos-fx search my-llava --data questions.jsonl --budget 25% --budget 12.5%

      deos-fx search my-qwen --data questions.jsonl --image-scale 0.7 --image-scale 0.5

      accelerate launch -m deos_fx search my-llava --data questions.jsonl

    A line of questions.jsonl:

      {"image": "images/1.png", "prompt": "What is this?", "answer": "A cat"}
    """
    check_target(output, force, model_dir)
    from deos_fx.cli.grouping import alike
    from deos_fx.cli.loading import checked_processor, load_model
    from deos_fx.cli.searching import (
        limits_of,
        measured,
        placed,
        presets_tuned,
        scales_of,
        search_processes,
        write_found,
    )
    from deos_fx.cli.terminal import announced, stages
    from deos_fx.data import batches, read_records, scaled_processor
    from deos_fx.passes.search.search import search as run_search

    # Mistakes in the limits and in the data show before the model is loaded.
    limits = limits_of(budget, flops, kv_cache, latency_ms, table=latency_table)
    records = read_records(data, urls=urls)
    scales = scales_of(image_scale, limits, records)
    with (
        search_processes(output, report_console(), device) as (folder, own, console),
        stages(console) as stage,
    ):
        with stage("load"):
            processor = checked_processor(model_dir)
            model = placed(load_model(model_dir, dtype=dtype, device=device), own)
            scaled = {scale: scaled_processor(processor, scale) for scale in scales}
            groups = alike(model, [*scaled.values()], records, batch_size, seed)
            inputs: dict[float, Any] = {
                scale: [batch for group in groups for batch in batches(own, group, batch_size)]
                for scale, own in scaled.items()
            }
        with stage.phased("search") as progress:
            result: Any = run_search(
                model,
                inputs if len(scales) > 1 else inputs[1.0],
                **limits,
                steps=steps,
                seed=seed,
                sites=sites,
                checkpoint=checkpoint,
                preset_evaluations=presets_tuned(preset_evaluations, console),
                progress=announced(progress, console),
            )
        names = []
        if folder is not None:
            with stage.phased("measure") as progress:
                result = measured(result, model, processor, groups, progress)
            names = write_found(result, folder, console, len(inputs[1.0]))
    console.print(f"Wrote {', '.join(names)} to {output}", highlight=False)
