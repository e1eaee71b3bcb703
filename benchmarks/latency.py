"""How well the latency of a policy is predicted from a profile of its model.

    OMP_NUM_THREADS=1 python benchmarks/latency.py --output benchmarks/results/latency-cpu.json
    python benchmarks/latency.py --device cuda --shape llava-1.5-7b --output latency.json

Policies are drawn at random: one or two sites anywhere, any numbers of tokens, pruned or merged.
Four each differ in the numbers of tokens alone, so that one elastic export serves them.
benchmarks/README.md says what the figures mean.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    DTYPES,
    SHAPES,
    Device,
    Dtype,
    build_inputs,
    build_model,
    conditions,
    device_of,
    measured,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx import OnnxModel, Policy, ReducedModel, Reduction, export_onnx, profile
from deos_fx.cost.latency import in_turns
from deos_fx.cost.model import CostModel
from deos_fx.exporters.profile import RUNTIMES
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.models.facts import facts_of
from deos_fx.passes.captures import Captures
from deos_fx.policy.site import split_site

__all__ = ["Settings", "compare", "draw", "measure"]

# Of the visual tokens that come to a site, the smallest and the largest share that it keeps.
_KEEP = (0.05, 0.9)
# Policies at the same sites, which share an export.
_ALIKE = 4


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shape: A name in `SHAPES`.
        runtimes: ``torch``, ``onnxruntime`` or both.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        text: Text tokens of a prompt.
        policies: Policies to draw.
        seed: Seed of the draw.
    """

    shape: str = "llava-1.5-small"
    runtimes: Sequence[str] = RUNTIMES
    device: str = "cpu"
    dtype: str = "fp32"
    text: int = 64
    policies: int = 20
    seed: int = 0


def draw(
    model: PreTrainedModel, inputs: dict[str, Tensor], count: int, seed: int = 0
) -> list[Policy]:
    """Draw policies at random.

    Args:
        model: The model.
        inputs: A prompt.
        count: How many.
        seed: Seed of the draw.
    """
    found = Captures(model).serving(completed(Call.of(facts_of(model), inputs))).sites
    assert found is not None
    # In order of depth.
    sites = [site.name for site in found.available()]
    rng, visual = random.Random(seed), facts_of(model).signature.visual_tokens
    policies: list[Policy] = []
    while len(policies) < count:
        steps = []
        for site in sorted(rng.sample(sites, rng.choice([1, 2])), key=sites.index):
            attention = (
                "last_text_attention" if split_site(site)[0] == "decoder" else "cls_attention"
            )
            score = rng.choice([attention, "feature_norm"])
            merging = {"gain": 1.0} if rng.random() < 0.5 else {}
            steps.append(Reduction(site, 1, scores={score: 1.0}, **merging))
        for _ in range(_ALIKE):
            left, kept = visual, []
            for _ in steps:
                # Every reduction drops a token, as elastic exports ask.
                left = min(max(len(steps), round(left * rng.uniform(*_KEEP))), left - 1)
                kept.append(left)
            pairs = zip(steps, kept, strict=True)
            policies.append(Policy(tuple(replace(step, keep=keep) for step, keep in pairs)))
    return policies[:count]


def measure(settings: Settings, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Profile the model, predict, and measure.

    Args:
        settings: The settings.
        save: Called with what is known so far.

    Returns:
        The figures of each runtime.

    Raises:
        ValueError: If the shape does not exist, or the device is not there.
    """
    device = device_of(settings.device)
    model = build_model(settings.shape, device, DTYPES[settings.dtype])
    inputs = build_inputs(model, 1, settings.text)
    policies = draw(model, inputs, settings.policies, settings.seed)
    found = conditions("latency", asdict(settings), device) | {"runtimes": {}}
    for runtime in settings.runtimes:
        found["runtimes"][runtime] = compare(model, inputs, policies, runtime, settings.device)
        save(found)
    return found


def compare(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    policies: Sequence[Policy],
    runtime: str,
    device: str,
) -> dict[str, Any]:
    """Profile a model in a runtime, and compare what is predicted of policies with measurements.

    Args:
        model: The model.
        inputs: A prompt.
        policies: The policies.
        runtime: ``torch`` or ``onnxruntime``.
        device: ``cpu`` or ``cuda``.
    """
    own = device if runtime == "onnxruntime" else None
    place = torch.device("cpu") if own else model.device
    times: list[float] = []
    with torch.no_grad(), _unreduced(model, inputs, runtime, device) as whole:
        for calls in _CALLS[runtime](model, policies, inputs, device):
            if not times:
                before = in_turns([whole, *calls], place)[0]
                profiled = profile(model, inputs, runtime=runtime, device=own)
            whole_time, *group = in_turns([whole, *calls], place)
            if not times:
                # A machine may be faster in one minute than in the next: all are timed in turns
                # with the unreduced model, and count as if that took as long as around the profile.
                usual = statistics.mean([before, whole_time])
            times += [time * usual / whole_time for time in group]
    cost = CostModel.of_call(Call.of(facts_of(model), inputs)).with_latency(profiled)
    rows = [
        {
            "policy": "; ".join(map(str, policy.reductions)),
            "predicted_ms": cost.amounts(policy, ["latency_ms"])["latency_ms"],
            "measured_ms": time,
        }
        for policy, time in zip(policies, times, strict=True)
    ]
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    return {
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "table": asdict(profiled),
        "policies": rows,
    }


@contextlib.contextmanager
def _unreduced(
    model: PreTrainedModel, inputs: dict[str, Tensor], runtime: str, device: str
) -> Iterator[Callable[[], object]]:
    """Give a prefill of the unreduced model."""
    if runtime == "torch":
        yield partial(model, **inputs, logits_to_keep=1)
        return
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(ReducedModel(model, Policy()), folder, inputs, device=device, verify=False)
        given = {name: value.cpu() for name, value in inputs.items()}
        yield partial(OnnxModel.from_pretrained(folder, device), **given, logits_to_keep=1)


def _in_torch(
    model: PreTrainedModel, policies: Sequence[Policy], inputs: dict[str, Tensor], device: str
) -> Iterator[list[Callable[[], object]]]:
    """Give a prefill of each policy in PyTorch."""
    yield [partial(ReducedModel(model, policy), **inputs, logits_to_keep=1) for policy in policies]


def _in_onnxruntime(
    model: PreTrainedModel, policies: Sequence[Policy], inputs: dict[str, Tensor], device: str
) -> Iterator[list[Callable[[], object]]]:
    """Give prefills of policies that share an export, in ONNX Runtime.

    Besides the unreduced one, a single export is in memory at a time.
    """
    given = {name: value.cpu() for name, value in inputs.items()}
    visual = facts_of(model).signature.visual_tokens
    for first in range(0, len(policies), _ALIKE):
        alike = policies[first : first + _ALIKE]
        with tempfile.TemporaryDirectory() as folder:
            reduced = ReducedModel(model, alike[0])
            export_onnx(reduced, folder, inputs, device=device, elastic=True, verify=False)
            run = OnnxModel.from_pretrained(folder, device)
            kept = (run.keeping(*policy.counts(visual)) for policy in alike)
            yield [partial(one, **given, logits_to_keep=1) for one in kept]


_CALLS = {"torch": _in_torch, "onnxruntime": _in_onnxruntime}


# *** the command ***


def table(results: dict[str, Any]) -> Table:
    """Return the predictions beside what was measured."""
    shown = Table("runtime", "policy", "predicted ms", "measured ms", "error")
    for runtime, found in results["runtimes"].items():
        for row in found["policies"]:
            predicted, measured = row["predicted_ms"], row["measured_ms"]
            error = f"{predicted / measured - 1:+.1%}"
            short = "; ".join(part.partition(",")[0] for part in row["policy"].split("; "))
            shown.add_row(runtime, short, f"{predicted:.2f}", f"{measured:.2f}", error)
        error = f"{found['median_error']:.1%}, at most {found['largest_error']:.1%}"
        shown.add_row(runtime, "median of the absolute errors", "", "", error, end_section=True)
    return shown


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"reference, {', '.join(SHAPES)}")] = Settings.shape,
    runtimes: Annotated[
        str, typer.Option(help="torch, onnxruntime, or both with a comma between.")
    ] = ",".join(RUNTIMES),
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: fp16 on a GPU, fp32 on the CPU.")
    ] = None,
    text: Annotated[int, typer.Option(min=2, help="Text tokens of a prompt.")] = Settings.text,
    policies: Annotated[int, typer.Option(min=1, help="Policies to draw.")] = Settings.policies,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = Settings.seed,
) -> None:
    """Compare the predicted latency of random policies with the measured one."""
    settings = Settings(
        shape=shape,
        runtimes=runtimes.split(","),
        device=device.value,
        dtype=dtype.value if dtype else ("fp16" if device is Device.cuda else "fp32"),
        text=text,
        policies=policies,
        seed=seed,
    )
    console = Console()
    results = measured(partial(measure, settings), output, console)
    console.print(table(results))


if __name__ == "__main__":
    typer.run(main)
