"""What an export costs beside transformers' own of the unreduced model.

    OMP_NUM_THREADS=1 python benchmarks/export.py --output benchmarks/results/export-cpu.json

benchmarks/README.md says what the figures mean. The exports take turns in one run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import SHAPES, build_inputs, build_model, conditions, device_of, measured
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter

from deos_fx import Policy, ReducedModel, Reduction, export_onnx
from deos_fx.models.facts import facts_of

__all__ = ["measure"]

THEIRS, OURS, REDUCED = "transformers", "unreduced", "a ninth after decoder.1"


def measure(shape: str, rounds: int, save: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Export a model for the CPU by transformers and by deos_fx, without and with a reduction.

    Args:
        shape: ``reference`` or a name in `SHAPES`.
        rounds: Exports of each.
        save: Called with what is known so far.

    Returns:
        Seconds and bytes of each export, and both over those of transformers.
    """
    device = device_of("cpu")
    model = build_model(shape, device, torch.float32)
    # Two prompts: an axis of one row would be taken for a constant.
    inputs = build_inputs(model, 2, 64)
    ninth = facts_of(model).signature.visual_tokens // 9
    exports = {
        THEIRS: partial(_theirs, model, inputs),
        OURS: partial(_ours, model, inputs, Policy()),
        REDUCED: partial(_ours, model, inputs, Policy((Reduction("decoder.1", ninth),))),
    }
    found = conditions("export", {"shape": shape, "rounds": rounds}, device)
    seconds: dict[str, list[float]] = {name: [] for name in exports}
    sizes: dict[str, int] = {}
    for i in range(rounds):
        for name in list(exports)[:: 1 if i % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                exports[name](Path(folder) / "model")
                seconds[name].append(time.perf_counter() - start)
                files = (file for file in Path(folder).rglob("*") if file.is_file())
                sizes[name] = sum(file.stat().st_size for file in files)
        found["exports"] = {
            name: {
                "seconds": statistics.median(own),
                "over_transformers": statistics.median(
                    a / b for a, b in zip(own, seconds[THEIRS], strict=False)
                ),
                "bytes": sizes[name],
                "bytes_over_transformers": sizes[name] / sizes[THEIRS],
            }
            for name, own in seconds.items()
        }
        save(found)
    return found


def _theirs(model: PreTrainedModel, inputs: Mapping[str, Tensor], folder: Path) -> None:
    """Export what transformers needs to generate, with fusions for the CPU."""
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exported = OnnxExporter().export_for_generation(
        model, dict(inputs), config, multi_token_decode=True
    )
    exported.save_pretrained(folder)


def _ours(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], policy: Policy, folder: Path
) -> None:
    export_onnx(ReducedModel(model, policy), folder, inputs, device="cpu", verify=False)


def _table(results: Mapping[str, Any]) -> Table:
    table = Table("export", "seconds", "over transformers", "MB", "over transformers")
    for name, figure in results["exports"].items():
        table.add_row(
            name,
            f"{figure['seconds']:.1f}",
            f"{figure['over_transformers']:.2f}",
            f"{figure['bytes'] / 1e6:.1f}",
            f"{figure['bytes_over_transformers']:.3f}",
        )
    return table


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"reference, {', '.join(SHAPES)}")] = "reference",
    rounds: Annotated[int, typer.Option(min=1, help="Exports of each.")] = 3,
) -> None:
    """Measure what an export costs beside transformers' own."""
    console = Console()
    results = measured(partial(measure, shape, rounds), output, console)
    console.print(_table(results))


if __name__ == "__main__":
    typer.run(main)
