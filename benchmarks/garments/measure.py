"""Measure the garment model: ``python -m benchmarks.garments.measure --data DIR``.

Prints accuracy by kind of question on test scenes, for the unreduced model and for four published
methods at a quarter of the visual tokens, and how many visual tokens touch a garment at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from deos_fx import Policy, presets, transform

from ..common import conditions
from . import KINDS, Example, accuracy, load, make_examples

METHODS = (presets.merge, presets.random, presets.fastervlm, presets.divprune)


def measure(data: Path, questions: int, seed: int, keep: float, console: Console) -> dict[str, Any]:
    """Answer test questions with the unreduced model and with each method.

    Args:
        data: The folder with Fashion-MNIST.
        questions: Number of questions.
        seed: Seed of their scenes.
        keep: Fraction of the visual tokens that each method keeps.
        console: Where progress is told.

    Returns:
        ``touched``, the share of visual tokens with a pixel of a garment or a tag, and
        ``accuracy``: method -> kind -> fraction of right answers.

    Raises:
        ValueError: If the folder has other contents.
    """
    examples = make_examples(questions, "test", seed, data=data)
    model, processor = load()
    found = {}
    policies = (Policy(()), *(method(keep=keep) for method in METHODS))
    for policy in policies:
        name = policy.name or "no reduction"
        reduced = transform(model, policy=policy)
        with torch.inference_mode():
            found[name] = accuracy(reduced.generate, processor, examples)
        console.print(f"{name}: {found[name]['overall']:.3f}")
    return {"touched": touched(examples), "accuracy": found}


def touched(examples: list[Example]) -> float:
    """Return the share of visual tokens on which a garment or a tag is seen."""
    return float(np.mean([example.scene.coverage.sum(0) > 0 for example in examples]))


def main(
    data: Annotated[Path, typer.Option(help="folder with Fashion-MNIST")],
    questions: Annotated[int, typer.Option(help="test questions, of all kinds in turn")] = 1000,
    seed: Annotated[int, typer.Option(help="seed of the test scenes")] = 1,
    keep: Annotated[float, typer.Option(help="fraction of the visual tokens to keep")] = 0.25,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Measure accuracy by kind of question, unreduced and with published methods."""
    console = Console()
    found = measure(data, questions, seed, keep, console)
    table = Table("kind", *found["accuracy"])
    for kind in ("overall", *KINDS):
        table.add_row(kind, *(f"{right[kind]:.3f}" for right in found["accuracy"].values()))
    console.print(table)
    console.print(f"{found['touched']:.1%} of the visual tokens touch a garment or a tag")
    if output is not None:
        settings = {"questions": questions, "seed": seed, "keep": keep}
        found = conditions("garments", settings, torch.device("cpu")) | found
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
