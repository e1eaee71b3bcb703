"""The command ``deos-fx export``: a reduced model as ONNX graphs."""

from __future__ import annotations

from typing import Annotated

import typer

from deos_fx.cli.console import report_console
from deos_fx.cli.options import Dtype, Force, Model, Output, PolicyFile, Preset, TokenLimit
from deos_fx.cli.outputs import check_target

__all__ = ["export"]


def export(
    model_dir: Model,
    out_dir: Output,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where ONNX Runtime is to be fast: cpu or cuda. Default: cuda for half precision."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Round the weights: int8 or int4. Default: as they are.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="An image like those of prompts to come, which have as many of such sizes; may be "
            "given several times. Default: one, where all have one size.",
        ),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option(
            "--elastic", help="One export for many budgets: OnnxModel.keeping chooses the counts."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Whether to compare ONNX Runtime's logits with PyTorch's.")
    ] = True,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Export a reduced model to ONNX: prefill and decode graphs that include the reductions.

    MODEL_DIR may be a folder that transform wrote; then its policy is used.
    OnnxModel.from_pretrained loads the result.

    [bold]Examples[/]

      deos-fx export my-llava onnx --policy policy.json

      deos-fx export my-llava onnx --preset merge --budget 12.5%

      deos-fx export reduced onnx

      deos-fx export my-qwen onnx --budget 25% --image photo.jpg
    """
    check_target(out_dir, force, model_dir)
    from deos_fx import export_onnx
    from deos_fx.cli.loading import load_reduced
    from deos_fx.cli.policies import Choice
    from deos_fx.cli.processors import copy_processor, image_inputs
    from deos_fx.cli.terminal import stages
    from deos_fx.exporters.manifest import FILES
    from deos_fx.files import fresh_folder

    # A wrong image shows before the model is loaded.
    example = None if image is None else image_inputs(model_dir, image)
    console = report_console()
    with fresh_folder(out_dir, FILES, whole=True) as folder, stages(console) as stage:
        with stage("load the model"):
            reduced = load_reduced(model_dir, Choice(policy, preset, budget), dtype=dtype)
        with stage.phased("export") as advance:
            export_onnx(
                reduced,
                folder,
                example_inputs=example,
                device=device,
                weights=weights,
                elastic=elastic,
                verify=verify,
                progress=advance,
            )
        copy_processor(model_dir, folder)
    console.print(f"Wrote {out_dir}", highlight=False)
