"""What an elastic export costs beside one with constant counts.

    OMP_NUM_THREADS=1 python benchmarks/elastic.py --output benchmarks/results/elastic-cpu.json

benchmarks/README.md says what the figures mean. The two exports take turns in one run.
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
from common import (
    DTYPES,
    SHAPES,
    Device,
    build_inputs,
    build_model,
    conditions,
    device_of,
    in_turns,
    measured,
)
from rich.console import Console

from deos_fx import OnnxModel, Policy, ReducedModel, Reduction, export_onnx
from deos_fx.models.facts import facts_of

__all__ = ["measure"]


def measure(
    shape: str, device: str, rounds: int, save: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Export a model twice, with a ninth of the tokens left after decoder layer 1, and run both.

    Args:
        shape: ``reference`` or a name in `SHAPES`.
        device: ``cpu`` or ``cuda``.
        rounds: Timed runs of each.
        save: Called with the figures.

    Returns:
        Seconds of the exports, milliseconds of a prefill of each, and their ratios.
    """
    model = build_model(shape, device_of(device), DTYPES["fp32" if device == "cpu" else "fp16"])
    keep = facts_of(model).signature.visual_tokens // 9
    reduced = ReducedModel(model, Policy((Reduction("decoder.1", keep),)))
    inputs = build_inputs(model, 1, 64)
    given = {name: value.cpu() for name, value in inputs.items()}
    settings = {"shape": shape, "device": device, "rounds": rounds, "keep": keep}
    found = conditions("elastic", settings, device_of(device))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runs = {}
        for name in ("static", "elastic"):
            target, start = Path(folder) / name, time.perf_counter()
            elastic = name == "elastic"
            export_onnx(reduced, target, inputs, device=device, elastic=elastic, verify=False)
            found[f"{name}_export_s"] = time.perf_counter() - start
            exported = OnnxModel.from_pretrained(target, device)
            runs[name] = partial(exported, **given, logits_to_keep=1)
        # Results come to the CPU in any case.
        times = in_turns(runs, rounds, torch.device("cpu"))
    ratios = [a / b for a, b in zip(times["elastic"], times["static"], strict=True)]
    found |= {
        "prefill_ms": {name: statistics.median(own) for name, own in times.items()},
        "elastic_over_static": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }
    save(found)
    return found


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"reference, {', '.join(SHAPES)}")] = "reference",
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    rounds: Annotated[int, typer.Option(min=2, help="Timed runs of each.")] = 30,
) -> None:
    """Measure what counts as inputs cost."""
    console = Console()
    results = measured(partial(measure, shape, device.value, rounds), output, console)
    console.print_json(data=results)


if __name__ == "__main__":
    typer.run(main)
