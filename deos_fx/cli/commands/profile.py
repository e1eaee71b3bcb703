"""The command ``deos-fx profile``: the latency of each decoder layer on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deos_fx.cli.console import Console, report_console
from deos_fx.cli.options import Dtype, Force, Model
from deos_fx.cli.outputs import check_target_file

__all__ = ["profile"]


def profile(
    model_dir: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")
    ] = Path("latency.json"),
    runtime: Annotated[
        Literal["torch", "onnxruntime"], typer.Option(help="What runs the model.")
    ] = "torch",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the CPU for torch, else CUDA if any.")
    ] = None,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Measure what each decoder layer takes at each number of tokens, on this machine.

    The table limits a search by the latency of this machine and runtime, also on
    another machine: with --latency-table. For onnxruntime the model is exported to a
    temporary folder first.

    [bold]Examples[/]

      deos-fx profile my-llava --runtime onnxruntime --device cuda

      deos-fx search my-llava --data questions.jsonl --latency-ms 20 --latency-table latency.json
    """
    check_target_file(output, force)
    from deos_fx.cli.loading import load_model
    from deos_fx.cli.processors import example_processor
    from deos_fx.cli.terminal import profile_table, stages
    from deos_fx.exporters.profile import profile as measure
    from deos_fx.inputs.example import example_inputs

    console = Console()
    # PyTorch runs where the model is; the device of ONNX Runtime is another matter.
    of_model, of_runtime = (device, None) if runtime == "torch" else (None, device)
    with stages(report_console()) as stage:
        with stage("load"):
            model = load_model(model_dir, dtype=dtype, device=of_model)
            inputs = example_inputs(model, example_processor(model_dir))
        with stage("measure"):
            table = measure(model, inputs, runtime=runtime, device=of_runtime)
    # Shown first: a disk may be full.
    console.print(profile_table(table))
    table.save(output)
    report_console().print(f"Wrote {output}", highlight=False)
