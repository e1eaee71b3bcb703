"""Memory and time of an export in ONNX Runtime: weights once or in each graph, and of fewer bits.

    python benchmarks/memory.py --output memory.json

benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import torch
import typer
from common import SHAPES, build_inputs, build_model, conditions
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from deos_fx import OnnxModel, ReducedModel, export_onnx, presets
from deos_fx.exporters.manifest import WEIGHTS as FILE
from deos_fx.exporters.quantise import WEIGHTS
from deos_fx.files import write_text
from deos_fx.models.upstream import CACHE

__all__ = ["load", "measure"]

CPU, INPUTS = torch.device("cpu"), "inputs.safetensors"
TEXT, NEW = 64, 8
# Name -> type of weights, whether graphs share them.
VARIANTS: dict[str, tuple[str | None, bool]] = {
    "float32": (None, False),
    "float32, low_memory": (None, True),
    **{name: (name, False) for name in WEIGHTS},
}


def measure(
    shape: str, rounds: int, save: Callable[[dict[str, Any]], None], keep: float = 1 / 9
) -> dict[str, Any]:
    """Export a shape with each type of weights, and load and run the exports in processes.

    Args:
        shape: A name in `SHAPES`.
        rounds: How often each variant is run; they take turns.
        save: Called with the results so far after each round.
        keep: Fraction of the visual tokens that `presets.merge` keeps.

    Returns:
        Memory and times by variant.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for weights in (None, *WEIGHTS):
            model = build_model(shape, CPU, torch.float32)
            reduced, target = ReducedModel(model, presets.merge(keep=keep)), Path(folder)
            export_onnx(reduced, target / str(weights), weights=weights, verify=False)
            save_file(build_inputs(model, 1, TEXT), target / INPUTS)
        found: dict[str, Any] = {name: {"runs": []} for name in VARIANTS}
        for _ in range(rounds):
            for name, (weights, low_memory) in VARIANTS.items():
                target = Path(folder) / str(weights)
                command = [sys.executable, __file__, "--load", str(target)]
                command += ["--low-memory"] if low_memory else []
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name]["runs"].append(json.loads(done.stdout.splitlines()[-1]))
                found[name] |= _medians(found[name]["runs"], (target / FILE).stat().st_size)
            save(found)
    return found


def _medians(runs: list[dict[str, float]], size: int) -> dict[str, float]:
    """Medians of all figures, and memory as a share of the file of weights."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    shares = {f"{name}_of_weights": medians[f"{name}_bytes"] / size for name in ("loaded", "peak")}
    return medians | shares | {"weights_bytes": size}


def load(folder: Path, low_memory: bool) -> dict[str, float]:
    """Load an export and run it, in a process that does nothing else.

    Args:
        folder: The export, beside a file of inputs for one prompt.
        low_memory: As for `OnnxModel.from_pretrained`.

    Returns:
        Bytes of memory above what the process held before, at most while loading and until a first
        answer; seconds of processor time, which other programs on the machine change less than the
        elapsed time, for loading, and for a prefill and a new token of one row and of four.
    """
    inputs = load_file(folder.parent / INPUTS)
    # Imports are no part of the memory of a model.
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    before, start = _memory("VmRSS"), process_time()
    runtime = OnnxModel.from_pretrained(folder, "cpu", low_memory=low_memory)
    found = {"load_seconds": process_time() - start, "loaded_bytes": _memory("VmHWM") - before}
    for rows in (1, 4):
        batch = {name: torch.cat([value] * rows) for name, value in inputs.items()}
        # The first run also allocates, and reads the file.
        for _ in range(2):
            start = process_time()
            output = runtime(**batch, logits_to_keep=1)
            found[f"prefill_{rows}_seconds"] = process_time() - start
        times = []
        for _ in range(NEW):
            token, start = output.logits[:, -1:].argmax(-1), process_time()
            output = runtime(input_ids=token, **{CACHE: output[CACHE]})
            times.append(process_time() - start)
        found[f"decode_{rows}_seconds"] = statistics.median(times)
        # What four rows need in addition is not weights.
        found.setdefault("peak_bytes", _memory("VmHWM") - before)
    return found


def _memory(kind: str) -> int:
    """Bytes that this process holds (``VmRSS``) or has held at most (``VmHWM``), on Linux.

    Pages of files that it has mapped count as well.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)
    )


# *** the command ***


def main(
    output: Annotated[Path | None, typer.Option(help="File for all results.")] = None,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llava-1.5-small",
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each variant.")] = 3,
    folder: Annotated[Path | None, typer.Option("--load", hidden=True)] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", hidden=True)] = False,
) -> None:
    """Measure memory and time of an export: weights once or in each graph, and of fewer bits."""
    if folder is not None:
        # Case: a process of its own, which `measure` has started.
        print(json.dumps(load(folder, low_memory)))
        return
    start = conditions("memory", {"shape": shape, "rounds": rounds}, CPU)

    def save(found: dict[str, Any]) -> None:
        if output is not None:
            write_text(output, json.dumps(start | {"variants": found}, indent=2) + "\n")

    figures = ("loaded_of_weights", "peak_of_weights", "load_seconds")
    figures += tuple(f"{part}_{rows}_seconds" for rows in (1, 4) for part in ("prefill", "decode"))
    table = Table("variant", "MB of weights", *figures)
    for name, found in measure(shape, rounds, save).items():
        cells = [f"{found[figure]:.3g}" for figure in figures]
        table.add_row(name, f"{found['weights_bytes'] / 1e6:.0f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
