"""The command ``deos-fx export``: a reduced model as ONNX graphs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from deos_fx.cli.console import report_console
from deos_fx.cli.options import (
    Dtype,
    Force,
    ImageScale,
    Model,
    Output,
    PolicyFile,
    Preset,
    TokenLimit,
)
from deos_fx.cli.outputs import check_target

__all__ = ["export"]


def export(
    model_dir: Model,
    out_dir: Output,
    policy: PolicyFile = None,
    preset: Preset = None,
    budget: TokenLimit = None,
    image_scale: ImageScale = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Where ONNX Runtime is to be fast. Default: cuda for half precision."),
    ] = None,
    weights: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Round the weights. Default: as they are."),
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
    genai: Annotated[
        bool,
        typer.Option(
            "--genai",
            help="A folder that onnxruntime-genai loads, for policies before the decoder.",
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

      deos-fx export my-llava genai --policy policy.json --genai
    """
    check_target(out_dir, force, model_dir)
    if genai and (weights is not None or elastic):
        option = "--elastic" if elastic else "--weights"
        raise ValueError(f"--genai and {option} exclude each other; leave one out")
    from deos_fx import export_genai, export_onnx
    from deos_fx.cli.loading import checked_processor, load_reduced
    from deos_fx.cli.policies import Choice
    from deos_fx.cli.processors import copy_processor, export_example
    from deos_fx.cli.questions import question_of
    from deos_fx.cli.terminal import stages
    from deos_fx.contents import FILES, recorded
    from deos_fx.data import open_image
    from deos_fx.files import fresh_folder
    from deos_fx.inputs.example import QUESTION, processed_example

    # A processor that was written here may be another model's.
    files = (*FILES, *recorded(out_dir))
    # A wrong image shows before the model is loaded.
    record, processor = None, None
    if image is not None:
        record, processor = question_of(image, QUESTION, urls=False), checked_processor(model_dir)
        for source in record.images:
            open_image(source, record.where)
    console = report_console()
    with fresh_folder(out_dir, files, whole=True) as folder, stages(console) as stage:
        with stage("load the model"):
            reduced = load_reduced(
                model_dir, Choice(policy, preset, budget, image_scale), dtype=dtype
            )
            if record is None:
                example = export_example(reduced, model_dir)
            else:
                example = processed_example(reduced.processor(processor), record)
        with stage.phased("export") as advance:
            given: dict[str, Any] = {
                "example_inputs": example,
                "device": device,
                "verify": verify,
                "progress": advance,
            }
            if genai:
                export_genai(reduced, folder, **given)
            else:
                export_onnx(reduced, folder, weights=weights, elastic=elastic, **given)
        copy_processor(model_dir, folder)
    console.print(f"Wrote {out_dir}", highlight=False)
