"""What reductions cost by themselves, in PyTorch and in ONNX Runtime: nodes and milliseconds.

    python benchmarks/reductions.py --output reductions-cpu.json

benchmarks/README.md says what each figure means. Both runtimes take turns in one run.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import SHAPES, Device, conditions, device_of, in_turns, measured, onnx_session
from operators import Settings, random_features, reduction_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from deos_fx import Reduction
from deos_fx.forms.needs import required_features
from deos_fx.forms.static import static_reduce
from deos_fx.passes.lower.emitter import Emitter

__all__ = ["COUNTS", "measure"]

COUNTS = ((64, 576), (320, 2880))
"""Tokens that stay, of how many: one image of LLaVA-1.5, and the five tiles of LLaVA-NeXT."""

GRID = "grid"
"""The feature that a lowered graph has as a constant."""

Results = dict[str, Any]


class _Alone(nn.Module):
    """A graph as a module of its own class, as exporters want it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.graph(**inputs)
        return found


def lowered(reduction: Reduction, count: int, inputs: Mapping[str, Tensor]) -> nn.Module:
    """Write a reduction as a graph, as in a lowered model: what the grid alone decides is constant.

    Args:
        reduction: The reduction.
        count: Tokens that stay.
        inputs: Tokens [B, V, d] and the features that it asks for, by name.

    Returns:
        A module that takes these inputs but the grid.
    """
    module = fx.GraphModule(nn.Module(), fx.Graph())
    # Constants go where the first weight is, and there is none.
    module.register_buffer("place", inputs["tokens"].new_zeros(()))
    given: dict[str, Any] = {
        name: value if name == GRID else module.graph.placeholder(name)
        for name, value in inputs.items()
    }
    # Features of an earlier block are named after it: they are like those of this one.
    known = {name: given[name.partition("@")[0]] for name in required_features(reduction)}
    emitter = Emitter(module)
    reduced = static_reduce(reduction, count, given["tokens"], None, known, emitter.call)
    module.graph.output({"reduced": reduced.tokens})
    module.recompile()
    del module.place
    return _Alone(module)


def measure(
    shape: str,
    device: str,
    rounds: int,
    save: Callable[[Mapping[str, Any]], None],
    counts: tuple[tuple[int, int], ...] = COUNTS,
) -> Results:
    """Export every kind of reduction, and time it in both runtimes.

    Args:
        shape: A name in `SHAPES`, for the widths of tokens and keys.
        device: ``cpu`` or ``cuda``.
        rounds: Timed runs of each.
        save: Called with the figures so far after each number of tokens.
        counts: Tokens that stay, of how many.

    Returns:
        By number of tokens and reduction: nodes of the graph, those of its loops included, and
        milliseconds in each runtime.
    """
    where = device_of(device)
    settings = {"shape": shape, "device": device, "rounds": rounds, "counts": counts}
    found = conditions("reductions", settings, where) | {"reductions": {}}
    for keep, visual in counts:
        rows: dict[str, Results] = {}
        for name, row in reduction_rows(keep, visual).items():
            inputs = _inputs(shape, device, visual, row.reduction)
            module = lowered(row.reduction, row.count(visual), inputs)
            inputs.pop(GRID, None)
            rows[name] = _compared(module, inputs, rounds)
        found["reductions"][f"{keep} of {visual}"] = rows
        save(found)
    return found


def _inputs(shape: str, device: str, visual: int, reduction: Reduction) -> dict[str, Tensor]:
    """Random tokens, and what else a reduction asks for."""
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPES[shape]())
    config.image_seq_length = visual
    dtype = "fp32" if device == "cpu" else "fp16"
    features = random_features(config, Settings(shape=shape, device=device, dtype=dtype))
    asked = {name.partition("@")[0] for name in required_features(reduction)}
    return {name: features[name] for name in sorted(asked | {"tokens"})}


def _compared(module: nn.Module, inputs: Mapping[str, Tensor], rounds: int) -> Results:
    """Nodes and milliseconds of a reduction."""
    device = inputs["tokens"].device
    on_cpu = {name: value.cpu() for name, value in inputs.items()}
    with torch.no_grad(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        session, nodes = onnx_session(module, inputs, Path(folder))
        calls = {"pytorch": partial(module, **inputs), "onnxruntime": partial(session, on_cpu)}
        times = in_turns(calls, rounds, device)
        del session, calls
    return {"nodes": nodes} | {
        f"{runtime}_ms": statistics.median(own) for runtime, own in times.items()
    }


def table(results: Results) -> Table:
    """Return the figures as a table."""
    shown = Table("tokens", "reduction", "nodes", "PyTorch, ms", "ONNX Runtime, ms")
    for counts, rows in results["reductions"].items():
        for name, row in rows.items():
            times = (f"{row[f'{runtime}_ms']:.2f}" for runtime in ("pytorch", "onnxruntime"))
            shown.add_row(counts, name, str(row["nodes"]), *times)
    return shown


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llava-1.5-small",
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 7,
) -> None:
    """Measure what reductions cost by themselves."""
    console = Console()
    results = measured(partial(measure, shape, device.value, rounds), output, console)
    console.print(table(results))


if __name__ == "__main__":
    typer.run(main)
