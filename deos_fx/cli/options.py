"""Define the options that commands share.

Annotations of options are evaluated at import, so nothing here waits for torch or transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deos_fx.cli.limits import read_limit

__all__ = [
    "AsJson",
    "DataFile",
    "Device",
    "Dtype",
    "Evaluations",
    "Force",
    "ImageScale",
    "ImageUrls",
    "Images",
    "Model",
    "OtherLimit",
    "Output",
    "OutputOption",
    "PolicyFile",
    "PolicyFiles",
    "Preset",
    "Presets",
    "Prompt",
    "TestFile",
    "TokenLimit",
    "TokenLimits",
    "TuneFile",
    "Urls",
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Folder that save_pretrained wrote, or a hub id.")
]

Output = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write.")]

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")
]

Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there already.")]

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the weights; by default as saved."),
]

Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ... or auto for all there are."),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="A policy file, or the folder of a search."),
]

Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A published method, fitted to the budget."),
]

ImageScale = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE",
        help="Let images enter with their sides scaled, in (0, 1]; alone or with a preset.",
    ),
]

PolicyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="A policy file, or the folder of a search; may be given several times.",
    ),
]

Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset", metavar="NAME", help="A preset; may be given several times. Default: all."
    ),
]

DataFile = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="Questions: JSONL, CSV or a folder of datasets; deos-fx data shows how it is read.",
    ),
]

TestFile = Annotated[
    Path, typer.Option(metavar="FILE", help="Questions with answers, as deos-fx data shows them.")
]

TuneFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Data to tune presets on; give what was searched with."),
]

Evaluations = Annotated[
    int,
    typer.Option(
        min=1, help="Settings tried to tune a preset; deos-fx search says how many are fair."
    ),
]

Images = Annotated[
    list[str],
    typer.Option("--image", metavar="FILE", help="An image; may be given several times."),
]

Prompt = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="The question. <image> in it says where an image goes; else it comes first.",
    ),
]

Urls = Annotated[
    bool, typer.Option("--urls", help="Download images where the data has https or http URLs.")
]

TokenLimit = Annotated[
    Any,
    typer.Option(
        "--budget",
        parser=read_limit,
        metavar="LIMIT",
        help="Visual tokens that may stay, mean over the decoder layers: 0.125, 12.5% or 18.",
    ),
]

TokenLimits = Annotated[
    list[Any] | None,
    typer.Option(
        "--budget",
        parser=read_limit,
        metavar="LIMIT",
        help="Visual tokens that may stay, mean over the decoder layers: 0.125, 12.5% or 18. Given "
        "several times: a policy for each, in one go.",
    ),
]

OtherLimit = Annotated[
    Any, typer.Option(parser=read_limit, metavar="LIMIT", help="Fraction, or absolute number.")
]
ImageUrls = Annotated[bool, typer.Option("--urls", help="Download --image if it is a URL.")]
