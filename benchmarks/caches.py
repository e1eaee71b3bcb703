"""What it saves that decode steps in ONNX Runtime write new keys in place.

    OMP_NUM_THREADS=1 python benchmarks/caches.py --output benchmarks/results/caches-cpu.json

Without it, each step copies what all layers hold, to put a new key behind it. benchmarks/README.md
says what the figures mean. All take turns in one run: PyTorch, and one export with and without.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import SHAPES, build_inputs, build_model, conditions, in_turns, measured
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deos_fx import OnnxModel, Policy, ReducedModel, Reduction, export_onnx
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE

__all__ = ["measure"]

_CPU = torch.device("cpu")


def measure(shape: str, rounds: int, save: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Decode after prompts of one image, with and without a reduction, in batches of 1 and 4.

    Args:
        shape: ``reference`` or a name in `SHAPES`.
        rounds: Timed steps of each.
        save: Called with what is known so far.

    Returns:
        Milliseconds of a step of each, and the ratios.
    """
    model = build_model(shape, _CPU, torch.float32)
    keep = facts_of(model).signature.visual_tokens // 9
    after_two = Policy((Reduction("decoder.1", keep),))
    policies = {"no reduction": Policy(), f"{keep} tokens after two layers": after_two}
    found = conditions("caches", {"shape": shape, "rounds": rounds}, _CPU) | {"steps": []}
    for name, policy in policies.items():
        reduced = ReducedModel(model, policy)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            export_onnx(reduced, folder, build_inputs(model, 1, 64), device="cpu", verify=False)
            copying, in_place = (OnnxModel.from_pretrained(folder, "cpu") for _ in range(2))
            # The same graph takes keys that are as long as what they hold.
            copying._decode.buffers = frozenset()
            runs = {"pytorch": reduced, "copying": copying, "in place": in_place}
            for rows in (1, 4):
                inputs = build_inputs(model, rows, 64)
                steps = {which: _steps(run, inputs) for which, run in runs.items()}
                times = in_turns(steps, rounds, _CPU)
                found["steps"].append({"policy": name, "rows": rows} | _figures(times))
                save(found)
    return found


@torch.no_grad()
def _steps(run: Any, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Return a function that decodes one token more, after a prefill."""
    cache = run(**inputs, logits_to_keep=1)[CACHE]
    word = inputs["input_ids"][:, -1:]
    return torch.no_grad()(partial(run, input_ids=word, **{CACHE: cache}))


def _figures(times: Mapping[str, list[float]]) -> dict[str, Any]:
    pairs = {"over_copying": "copying", "over_pytorch": "pytorch"}
    return {
        "ms": {name: statistics.median(own) for name, own in times.items()},
        "in_place": {
            name: statistics.median(
                a / b for a, b in zip(times["in place"], times[other], strict=True)
            )
            for name, other in pairs.items()
        },
    }


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"reference, {', '.join(SHAPES)}")] = "llava-1.5-small",
    rounds: Annotated[int, typer.Option(min=2, help="Timed steps of each.")] = 60,
) -> None:
    """Measure decode steps."""
    console = Console()
    results = measured(partial(measure, shape, rounds), output, console)
    table = Table("policy", "rows", "PyTorch ms", "copying ms", "in place ms", "over copying")
    for step in results["steps"]:
        milliseconds = (f"{step['ms'][name]:.1f}" for name in ("pytorch", "copying", "in place"))
        ratio = f"{step['in_place']['over_copying']:.2f}"
        table.add_row(step["policy"], str(step["rows"]), *milliseconds, ratio)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
