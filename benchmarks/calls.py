"""What stays in memory of many calls: images of ever new sizes, and options that change.

    python benchmarks/calls.py --output calls.json

benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import transformers as hf
import typer
from common import conditions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deos_fx import Policy, Reduction, transform
from deos_fx.files import write_text
from deos_fx.passes.captures import CAPTURES
from deos_fx.runtime.graphs import GRAPHS

__all__ = ["measure"]

IMAGE, START, END = 120, 122, 123

POLICY = Policy(
    (
        Reduction("projector", 0.5, scores={"feature_norm": 1.0}, gain=1.0, mass_bias=1.0),
        Reduction("decoder.1", 0.5, scores={"last_text_attention": 1.0}),
    )
)

# What changes from call to call beside the image. Each of them takes another path somewhere.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"logits_to_keep": 1},
    {"logits_to_keep": 7},
    {"output_hidden_states": True},
    {"use_cache": False},
    {"num_items_in_batch": 3, "labels": True},
    {"num_items_in_batch": 5, "labels": True},
)


class _Captures(logging.Handler):
    """Counts what a reduced model says it does."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.counts = {"captured": 0, "lowered": 0}

    def emit(self, record: logging.LogRecord) -> None:
        for what in self.counts:
            self.counts[what] += record.getMessage().startswith(what)


def measure(calls: int, sizes: int, layers: int) -> dict[str, Any]:
    """Call a reduced Qwen2.5-VL with random weights again and again.

    Args:
        calls: How often.
        sizes: How many sizes of images take turns, in a random order.
        layers: Decoder layers.

    Returns:
        Captures, lowered graphs, seconds and memory, ten times on the way.
    """
    handler = _Captures()
    logger = logging.getLogger("deos_fx")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    reduced = transform(_model(layers), policy=POLICY)
    process, steps = psutil.Process(), []
    began = time.process_time()
    for done, (shape, options) in enumerate(itertools.islice(_calls(sizes), calls), start=1):
        with torch.no_grad():
            reduced(**_prompt(*shape, options))
        if done % max(calls // 10, 1) == 0:
            gc.collect()
            steps.append(
                {
                    "calls": done,
                    **handler.counts,
                    "megabytes": process.memory_info().rss / 2**20,
                    "objects": len(gc.get_objects()),
                    "processor_seconds": time.process_time() - began,
                }
            )
    logger.removeHandler(handler)
    logger.setLevel(level)
    return {"bounds": {"captures": CAPTURES, "graphs": GRAPHS}, "steps": steps}


def _model(layers: int) -> Any:
    torch.manual_seed(0)
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "window_size": 16}
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"intermediate_size": 64, "out_hidden_size": 64},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return hf.AutoModelForImageTextToText.from_config(config)


def _calls(sizes: int) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Sizes of images, each equally often, and options in turn."""
    shapes = [(2 + number // 10, 2 + number % 10) for number in range(sizes)]
    options = itertools.cycle(OPTIONS)
    order = random.Random(0)
    while True:
        order.shuffle(shapes)
        for shape in shapes:
            yield shape, next(options)


def _prompt(rows: int, columns: int, options: dict[str, Any]) -> dict[str, Any]:
    """A prompt with one image of rows x columns visual tokens."""
    ids = torch.tensor([[3, 4, START, *[IMAGE] * (rows * columns), END, 5, 6, 7, 8]])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(4 * rows * columns, 3 * 2 * 16),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }
    if "labels" in options:
        labels: Tensor = torch.where(ids == IMAGE, -100, ids)
        return inputs | options | {"labels": labels}
    return inputs | options


def main(
    output: Annotated[Path | None, typer.Option(help="File for all results.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="How many calls.")] = 500,
    sizes: Annotated[int, typer.Option(min=1, help="How many sizes of images.")] = 100,
    layers: Annotated[int, typer.Option(min=3, help="Decoder layers of the model.")] = 12,
) -> None:
    """Measure what stays in memory of many calls."""
    settings = {"calls": calls, "sizes": sizes, "layers": layers}
    found = conditions("calls", settings, torch.device("cpu")) | measure(calls, sizes, layers)
    table = Table("calls", "captured", "lowered", "memory, MB", "objects", "s of processor")
    for step in found["steps"]:
        figures = [f"{step[name]:.0f}" for name in ("megabytes", "objects", "processor_seconds")]
        table.add_row(*(str(step[name]) for name in ("calls", "captured", "lowered")), *figures)
    Console().print(table)
    if output is not None:
        write_text(output, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
