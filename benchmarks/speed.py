"""What reductions save: time, memory and operations, on this CPU or on one CUDA GPU.

    python benchmarks/speed.py --output cpu.json
    python benchmarks/speed.py --shape llava-1.5-7b --device cuda --output gpu.json

benchmarks/README.md says what each figure means. Variants of a model take turns in one run, so that
whatever else slows the machine slows all of them, and ratios stay fair.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    now,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from deos_fx import (
    Budget,
    OnnxModel,
    Policy,
    ReducedModel,
    export_onnx,
    presets,
)
from deos_fx.cli.terminal import Advance, Stages, stages
from deos_fx.cost.latency import milliseconds
from deos_fx.cost.model import CostModel
from deos_fx.inputs.call import Call
from deos_fx.models.facts import facts_of
from deos_fx.models.upstream import CACHE

__all__ = ["Settings", "measure"]

WARM_UP = 2
ORIGINAL, EMPTY, REDUCED = "original", "empty", "reduced"
RUNTIMES = {"pytorch": "PyTorch", "onnxruntime": "ONNX RT"}


# *** measuring ***


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shape: ``reference`` or a name in `SHAPES`.
        policy: A policy for that shape; None takes `preset`.
        preset: Name of a preset, fitted to the budget.
        budget: Fraction of the visual tokens that may stay, mean over the decoder layers.
        device: ``cpu`` or ``cuda``.
        batch: Prompts.
        text: Text tokens of each prompt.
        new_tokens: Tokens to generate, at least 2; the first comes from the prefill.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        onnx: Whether to measure ONNX Runtime too.
        repeats: Timed runs of every variant.
    """

    shape: str = "reference"
    policy: Policy | None = None
    preset: str = "merge"
    budget: float = 0.125
    device: str = "cpu"
    batch: int = 1
    text: int = 64
    new_tokens: int = 16
    dtype: str = "fp32"
    onnx: bool = True
    repeats: int = 15


@dataclass(frozen=True)
class _Run:
    """One generation.

    Attributes:
        prefill_ms: From pixels and prompt to the first new token.
        decode_ms: Of each further token, on average.
        tokens: [B, new_tokens] on the CPU.
        held_bytes: Memory that torch held on the GPU before: the weights.
        peak_bytes: The most it held during the run, weights included.
    """

    prefill_ms: float
    decode_ms: float
    tokens: Tensor
    held_bytes: int
    peak_bytes: int


@torch.no_grad()
def _run(call: Callable[..., Any], inputs: Mapping[str, Tensor], new_tokens: int) -> _Run:
    """Generate greedily, in the loop that every variant is timed in."""
    device = inputs["input_ids"].device
    held = _held_bytes(device)
    start = now(device)
    output = call(**inputs, logits_to_keep=1, use_cache=True)
    tokens = [output.logits[:, -1:].argmax(-1)]
    middle = now(device)
    for _ in range(new_tokens - 1):
        output = call(input_ids=tokens[-1], **{CACHE: output[CACHE]}, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    end = now(device)
    if not output.logits.isfinite().all():
        raise RuntimeError("the logits are not finite; try another dtype")
    return _Run(
        1e3 * (middle - start),
        1e3 * (end - middle) / (new_tokens - 1),
        torch.cat(tokens, dim=1).cpu(),
        held,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def _held_bytes(device: torch.device) -> int:
    """What torch holds on a GPU now, from where the peak is measured anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _take_turns(
    variants: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, Tensor],
    settings: Settings,
    advance: Advance,
) -> dict[str, list[_Run]]:
    """Runs of each variant: one after the other, back and forth, without those that warm up."""
    runs: dict[str, list[_Run]] = {name: [] for name in variants}
    rounds = WARM_UP + settings.repeats
    for i in range(rounds):
        for name in list(variants)[:: 1 if i % 2 == 0 else -1]:
            runs[name].append(_run(variants[name], inputs, settings.new_tokens))
        advance(i + 1, rounds)
    return {name: made[WARM_UP:] for name, made in runs.items()}


@torch.no_grad()
def _kv_bytes(call: Callable[..., Any], inputs: Mapping[str, Tensor]) -> int:
    """Bytes of the keys and values that a prefill leaves, read off the cache."""
    cache = call(**inputs, logits_to_keep=1, use_cache=True)[CACHE]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(
    settings: Settings, console: Console, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure PyTorch and, if it is asked for, ONNX Runtime.

    Args:
        settings: What to measure.
        console: Where to show progress.
        save: Called with the results after each runtime, so that those of PyTorch are kept if the
            export fails.

    Returns:
        Everything that was found out, as JSON takes it.

    Raises:
        ValueError: If a setting makes no sense or the policy does not fit the shape.
        RuntimeError: If ONNX Runtime cannot use the device, or logits are not finite.
    """
    device = device_of(settings.device)
    with stages(console) as stage:
        with stage("build the model"):
            model = build_model(settings.shape, device, DTYPES[settings.dtype])
            inputs = build_inputs(model, settings.batch, settings.text)
            costs = CostModel.of_call(Call.of(facts_of(model), {**inputs, "logits_to_keep": 1}))
            policy = settings.policy or _fitted_preset(settings, model, costs)
            reduced = {EMPTY: ReducedModel(model, Policy()), REDUCED: ReducedModel(model, policy)}
        measured = {name: value for name, value in asdict(settings).items() if name != "policy"}
        measured |= {"warm_up": WARM_UP}
        results = conditions("speed", measured, device) | _predictions(policy, costs)
        variants = {ORIGINAL: model, **reduced}
        with stage("PyTorch") as advance:
            runs = _take_turns(variants, inputs, settings, advance)
            results["pytorch"] = _figures(runs)
            for name, variant in variants.items():
                results["pytorch"][name]["kv_bytes"] = _kv_bytes(variant, inputs)
            results["vision_ms"] = milliseconds(_vision(model, inputs), device)
        save(results)
        if settings.onnx:
            onnx_runs = _run_onnx(reduced, inputs, settings, stage)
            results["onnxruntime"] = _figures(onnx_runs, same_as=runs)
            save(results)
    return results


def _run_onnx(
    reduced: Mapping[str, ReducedModel],
    inputs: Mapping[str, Tensor],
    settings: Settings,
    stage: Stages,
) -> dict[str, list[_Run]]:
    """Export the variants and let them take turns in ONNX Runtime. The models end on the CPU."""
    on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}
    # Windows keeps files that sessions have mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with stage("export to ONNX") as advance:
            _export(reduced, Path(folder), advance)
        _release(reduced[EMPTY].model)
        with stage("ONNX Runtime") as advance:
            sessions = _sessions(Path(folder), reduced, torch.device(settings.device))
            return _take_turns(sessions, on_cpu, settings, advance)


def _fitted_preset(settings: Settings, model: PreTrainedModel, costs: CostModel) -> Policy:
    limits = Budget(visual_tokens=settings.budget).limits(costs.predict(Policy()))
    return presets.fit(settings.preset, limits["visual_tokens"], model)


def _vision(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """The part of the prefill that reductions after the vision tower leave as it is."""
    encode: Any = model.get_image_features

    def run() -> None:
        with torch.no_grad():
            encode(pixel_values=inputs["pixel_values"])

    return run


def _export(reduced: Mapping[str, ReducedModel], folder: Path, advance: Advance) -> None:
    for i, (name, variant) in enumerate(reduced.items()):
        advance(i, len(reduced))
        export_onnx(variant, folder / name)


def _release(model: PreTrainedModel) -> None:
    """Make room on the GPU: ONNX Runtime loads the weights once for every graph."""
    movable: Any = model
    movable.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sessions(folder: Path, names: Iterable[str], device: torch.device) -> dict[str, OnnxModel]:
    """The exported variants; `OnnxModel` raises if ONNX Runtime falls back to another device."""
    sessions = {name: OnnxModel.from_pretrained(folder / name, device) for name in names}
    used = {session.device.type for session in sessions.values()}
    if used != {device.type}:
        raise RuntimeError(f"ONNX Runtime runs on {used}, but {device.type} is to be measured")
    return sessions


# *** results ***


def _figures(
    runs: Mapping[str, Sequence[_Run]], same_as: Mapping[str, Sequence[_Run]] | None = None
) -> dict[str, dict[str, Any]]:
    """Medians of each variant, and medians of its ratios to the first variant in the same round.

    Args:
        runs: By variant.
        same_as: Runs whose tokens should be the same, by variant.
    """
    baseline = next(iter(runs.values()))
    figures: dict[str, dict[str, Any]] = {}
    for name, made in runs.items():
        figure: dict[str, Any] = {
            "held_bytes": made[-1].held_bytes or None,
            "peak_bytes": max(run.peak_bytes for run in made) or None,
        }
        for part in ("prefill_ms", "decode_ms"):
            times = [getattr(run, part) for run in made]
            bases = [getattr(run, part) for run in baseline]
            ratios = [new / base for new, base in zip(times, bases, strict=True)]
            figure[part] = statistics.median(times)
            figure[part.replace("_ms", "_ratio")] = statistics.median(ratios)
            figure[part.replace("_ms", "_samples_ms")] = times
        if same_as is not None:
            equal = made[-1].tokens == same_as[name][-1].tokens
            figure |= {"equal_tokens": int(equal.sum()), "tokens": equal.numel()}
        figures[name] = figure
    return figures


def _predictions(policy: Policy, costs: CostModel) -> dict[str, Any]:
    """What the cost model says of the two, without running them."""
    before, after = costs.predict(Policy()), costs.predict(policy)
    return {
        "policy": json.loads(policy.to_json()),
        "predicted": {
            ORIGINAL: asdict(before),
            REDUCED: asdict(after),
            "flops_ratio": after.flops / before.flops,
            "kv_ratio": after.kv_bytes / before.kv_bytes,
        },
    }


# *** the command ***


def _table(results: Mapping[str, Any]) -> Table:
    settings = results["settings"]
    table = Table(
        title=f"{settings['shape']}, {settings['dtype']}, {settings['device']}: "
        f"medians of {settings['repeats']} runs"
    )
    table.add_column("variant", no_wrap=True)
    figures = {
        f"{runtime} {name}": _cells(figure)
        for key, runtime in RUNTIMES.items()
        for name, figure in results.get(key, {}).items()
    }
    for column in next(iter(figures.values())):
        table.add_column(column, justify="right")
    for name, cells in figures.items():
        table.add_row(name, *cells.values())
    return table


def _cells(figure: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table by column; a GPU's memory only where there is a GPU."""
    kv, peak = figure.get("kv_bytes"), figure["peak_bytes"]
    cells = {
        "prefill ms": f"{figure['prefill_ms']:.1f}",
        "prefill ratio": f"{figure['prefill_ratio']:.2f}",
        "decode ms": f"{figure['decode_ms']:.2f}",
        "decode ratio": f"{figure['decode_ratio']:.2f}",
        "KV MiB": f"{kv / 2**20:.3g}" if kv else "-",
        "same": f"{figure['equal_tokens']}/{figure['tokens']}" if "tokens" in figure else "-",
    }
    return cells | ({"GPU MiB": f"{peak / 2**20:.0f}"} if peak else {})


def _print(results: Mapping[str, Any], console: Console) -> None:
    console.print(_table(results))
    predicted = results["predicted"]
    console.print(
        f"Predicted: {predicted['flops_ratio']:.1%} of the FLOPs of a prefill, "
        f"{predicted['kv_ratio']:.1%} of the KV cache after it. "
        f"Vision tower and projector alone: {results['vision_ms']:.2f} ms.",
        highlight=False,
    )


def main(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON to write.")],
    shape: Annotated[str, typer.Option(help=f"reference, {', '.join(SHAPES)}.")] = "reference",
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A policy file, instead of a preset.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"Fitted to the budget: {', '.join(presets.names())}.")
    ] = Settings.preset,
    budget: Annotated[
        float, typer.Option(help="Fraction of the visual tokens that may stay.")
    ] = Settings.budget,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    batch: Annotated[int, typer.Option(min=1, help="Prompts.")] = Settings.batch,
    text: Annotated[int, typer.Option(min=2, help="Text tokens of a prompt.")] = Settings.text,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate.")
    ] = Settings.new_tokens,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: fp32 on the CPU, fp16 on a GPU.")
    ] = None,
    onnx: Annotated[bool, typer.Option(help="Whether to measure ONNX Runtime too.")] = True,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed runs of every variant.")
    ] = Settings.repeats,
) -> None:
    """Measure what reductions save: time, memory and operations."""
    settings = Settings(
        shape=shape,
        policy=Policy.load(policy) if policy else None,
        preset=preset,
        budget=budget,
        device=device,
        batch=batch,
        text=text,
        new_tokens=new_tokens,
        dtype=dtype or ("fp16" if device is Device.cuda else "fp32"),
        onnx=onnx,
        repeats=repeats,
    )
    console = Console()
    results = measured(partial(measure, settings, console), output, console)
    _print(results, console)


if __name__ == "__main__":
    typer.run(main)
