"""What a gradient step costs: time beside forward passes, memory beside a plain backward pass.

    python -m benchmarks.search.step --output benchmarks/results/step-cpu.json
    python -m benchmarks.search.step --shape llava-1.5-7b --device cuda --dtype bf16 \
        --batch 8 --output benchmarks/results/step-cuda.json

A step trains the relaxed reductions of one place on one batch; the model is frozen. Times are
medians of runs that take turns. The memory of a call is its peak above what was held before it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import (
    DTYPES,
    SHAPES,
    Device,
    Dtype,
    build_inputs,
    build_model,
    conditions,
    device_of,
    in_turns,
    now,
)
from deos_fx.cost.memory import peak_bytes
from deos_fx.files import write_text
from deos_fx.passes.search.descent import Descent, site_tokens
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.outcome import RUNNERS_UP
from deos_fx.passes.search.places import placed
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.space import relaxed, start_reduction
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.budget import Budget
from deos_fx.policy.policy import Policy

__all__ = ["Settings", "measure"]

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shape: ``reference`` or a name in `SHAPES`.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        batch: Prompts of the batch, each with one image.
        text: Text tokens of each prompt.
        budget: Fraction of the visual tokens that may stay, mean over the decoder layers.
        repeats: Timed runs.
    """

    shape: str = "llava-1.5-eighth"
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = 1
    text: int = 64
    budget: float = 0.125
    repeats: int = 5


Row = dict[str, Any]
Call = Callable[[], object]


def measure(settings: Settings) -> list[Row]:
    """Measure a forward pass, a backward pass, and a step at three places.

    Returns:
        A row for each: its name, seconds, seconds over those of the forward pass, bytes, and bytes
        over those of the backward pass. Rows of steps have the seconds of a batch's first step as
        well, which computes what comes before the first reduction.

    Raises:
        ValueError: If there is no such shape or device.
    """
    device = device_of(settings.device)
    model = build_model(settings.shape, device, DTYPES[settings.dtype])
    inputs = build_inputs(model, settings.batch, settings.text)
    # The last words are what is asked for.
    labels = inputs["input_ids"].clone()
    labels[:, : -settings.text // 4] = -100
    data = inputs | {"labels": labels}
    problem = SearchProblem.of(model, [data], Budget(visual_tokens=settings.budget))
    places = _places(problem)
    firsts = {name: _seconds(_first(problem, place), device) for name, place in places.items()}
    steps = {name: _repeated(problem, place) for name, place in places.items()}
    calls = {
        FORWARD: lambda: _forward(model, inputs),
        BACKWARD: lambda: _backward(model, data),
        **steps,
    }
    times = in_turns(calls, settings.repeats, device)
    seconds = {name: statistics.median(own) / 1e3 for name, own in times.items()}
    held = {name: peak_bytes(call, device) for name, call in calls.items()}
    return [
        {
            "name": name,
            "seconds": seconds[name],
            "forwards": seconds[name] / seconds[FORWARD],
            "bytes": held[name],
            "backwards": held[name] / held[BACKWARD],
            **({"first_forwards": firsts[name] / seconds[FORWARD]} if name in firsts else {}),
        }
        for name in calls
    ]


# *** what is measured ***


def _forward(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs, use_cache=False)


def _backward(model: Any, data: Mapping[str, Tensor]) -> None:
    """Run a backward pass with frozen weights and checkpointing, as for a trained prompt."""
    model.activation_checkpointing_enable()
    # Checkpoints are only made while training; these models drop nothing out.
    model.train()
    model.enable_input_require_grads()
    try:
        model(**data, use_cache=False).loss.backward()
    finally:
        model.disable_input_require_grads()
        model.eval()
        model.activation_checkpointing_disable()


def _places(problem: SearchProblem) -> dict[str, Policy]:
    """Return the projector alone, the projector with a decoder site, and an early decoder site."""
    sites = {site.name: site for site in problem.searched_sites()}
    names = [name for name in sites if name.startswith("decoder.")]
    early, middle = names[0], names[len(names) // 2]
    found = {}
    for place in (["projector"], ["projector", middle], [early]):
        tokens = site_tokens(problem, [sites[name] for name in place])
        starts = [start_reduction(sites[name], tokens[name]) for name in place]
        policy = placed(problem, starts)
        if policy is not None:
            found[f"step at {' and '.join(place)}"] = policy
    return found


def _first(problem: SearchProblem, policy: Policy) -> Call:
    """Return a first step: nothing of its batch is computed yet."""
    problem.fronts.clear()
    return _repeated(problem, policy)


def _repeated(problem: SearchProblem, policy: Policy) -> Call:
    """Return a step that can be taken again and again."""
    reductions = relaxed(policy, problem.visual_tokens, runners_up=RUNNERS_UP)
    state = SearchState.start(reductions, AugmentedLagrangian(problem.limits), {})
    return Descent(problem, state, 10**6, 0).step


# *** clock and memory ***


def _seconds(call: Call, device: torch.device) -> float:
    start = now(device)
    call()
    return now(device) - start


# *** the command ***


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"reference, {', '.join(SHAPES)}.")] = Settings.shape,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.fp32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of the batch.")] = Settings.batch,
    text: Annotated[int, typer.Option(min=8, help="Text tokens of each prompt.")] = Settings.text,
    budget: Annotated[
        float, typer.Option(help="Fraction of the visual tokens that may stay.")
    ] = Settings.budget,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs.")] = Settings.repeats,
) -> None:
    """Measure what a gradient step costs."""
    settings = Settings(shape, device.value, dtype.value, batch, text, budget, repeats)
    try:
        where = device_of(settings.device)
        rows = measure(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    record = conditions("step", asdict(settings), where) | {"rows": rows}
    write_text(output, json.dumps(record, indent=1) + "\n")
    table = Table("", "seconds", "forward passes", "first", "MiB", "of a backward pass")
    for row in rows:
        first = f"{row['first_forwards']:.2f}" if "first_forwards" in row else ""
        table.add_row(
            row["name"],
            f"{row['seconds']:.3f}",
            f"{row['forwards']:.2f}",
            first,
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['backwards']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(f"Wrote {output}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
