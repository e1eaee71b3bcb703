"""What weights of 8 and 4 bits change in the answers of the reference model, in ONNX Runtime.

    python benchmarks/quantised.py --output quantised.json

benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import conditions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deos_fx import OnnxModel, Policy, ReducedModel, export_onnx, presets, reference
from deos_fx.exporters.manifest import WEIGHTS as FILE
from deos_fx.exporters.quantise import WEIGHTS
from deos_fx.files import write_text

__all__ = ["measure"]

POLICIES = {"empty": Policy(), "merge": presets.merge(keep=18)}


def measure(questions: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Answer questions about held-out scenes with each type of weights.

    Args:
        questions: How many.
        save: Called with the results so far after each export.

    Returns:
        Right answers, agreement and bytes, by policy and type of weights.
    """
    model, processor = reference.load()
    examples = reference.make_examples(questions, "test")
    results: dict[str, Any] = {}
    for name, policy in POLICIES.items():
        reduced, exact = ReducedModel(model, policy), list[list[int]]()
        results[name] = {}
        for weights in (None, *WEIGHTS):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                target = Path(folder) / "onnx"
                export_onnx(reduced, target, weights=weights, verify=False)
                runtime = OnnxModel.from_pretrained(target, "cpu")
                rows, generate = _noted(runtime, processor.tokenizer.pad_token_id)
                right = reference.accuracy(generate, processor, examples)
                size = (target / FILE).stat().st_size
            # The first export has the weights of the model.
            exact = exact or rows
            same = sum(ours == theirs for ours, theirs in zip(rows, exact, strict=True))
            results[name][weights or "float32"] = {
                "right": right,
                "agreement": same / questions,
                "weights_bytes": size,
            }
            save(results)
    return results


def _noted(model: OnnxModel, pad: int) -> tuple[list[list[int]], Callable[..., Tensor]]:
    """A list of the rows that a model generates, without padding; a `generate` that fills it."""
    rows: list[list[int]] = []

    def generate(**inputs: Tensor) -> Tensor:
        ids = model.generate(**inputs)
        rows.extend(row[row != pad].tolist() for row in ids)
        return ids

    return rows, generate


def main(
    output: Annotated[Path | None, typer.Option(help="File for all results.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many questions.")] = 480,
) -> None:
    """Measure what weights of 8 and 4 bits change in answers."""
    start = conditions("quantised", {"questions": questions}, torch.device("cpu"))

    def save(results: dict[str, Any]) -> None:
        if output is not None:
            write_text(output, json.dumps(start | {"policies": results}, indent=2) + "\n")

    table = Table("policy", "weights", "right", "same answers", "MB of weights")
    for policy, variants in measure(questions, save).items():
        for weights, found in variants.items():
            table.add_row(
                policy,
                weights,
                f"{found['right']['overall']:.1%}",
                f"{found['agreement']:.1%}",
                f"{found['weights_bytes'] / 1e6:.1f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
