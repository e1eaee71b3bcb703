"""What compiling costs: time and memory of capture, analysis, insertion and lowering at 7B shapes.

    python benchmarks/capture.py --output capture.json

Each model is built on the meta device, in a process of its own whose peak of memory is measured;
benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as hf
import typer
from common import SHAPES, conditions
from rich.console import Console
from rich.table import Table

from deos_fx import Policy, Reduction, transform
from deos_fx.files import write_text
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.inputs.call import Call
from deos_fx.inputs.complete import completed
from deos_fx.inputs.example import example_inputs
from deos_fx.models.facts import facts_of
from deos_fx.passes.graph import blocks_of
from deos_fx.passes.lower.insert_relaxed import insert_relaxed
from deos_fx.passes.notes import note_of
from deos_fx.passes.pipeline import Captured, capture_call, lower_call

__all__ = ["MODELS", "measure"]

_QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584}
_INTERNVL_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}

MODELS: Mapping[str, Callable[[], Any]] = {
    "llava-tiny": SHAPES["llava-tiny"],
    "llava-1.5-7b": SHAPES["llava-1.5-7b"],
    "qwen2.5-vl-7b": lambda: hf.Qwen2_5_VLConfig(
        text_config=_QWEN_TEXT, vision_config=_QWEN_VISION
    ),
    "gemma3-4b": lambda: hf.Gemma3Config(
        text_config={"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
        },
    ),
    "internvl3-8b": lambda: hf.InternVLConfig(
        text_config=hf.Qwen2Config(**_INTERNVL_TEXT, vocab_size=152000), image_token_id=151667
    ),
    "smolvlm-2.2b": lambda: hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(num_hidden_layers=24, hidden_size=2048),
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        scale_factor=3,
    ),
    # Large ones: three quarters of their layers keep a state, 64 layers, 80 layers.
    "qwen3.5-27b": lambda: hf.Qwen3_5Config(
        text_config={
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 64,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
        },
        vision_config={"depth": 27, "hidden_size": 1152, "out_hidden_size": 5120},
    ),
    "qwen2.5-vl-32b": lambda: hf.Qwen2_5_VLConfig(
        text_config={
            **_QWEN_TEXT,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
        vision_config={**_QWEN_VISION, "out_hidden_size": 5120},
    ),
    "qwen2.5-vl-72b": lambda: hf.Qwen2_5_VLConfig(
        text_config={
            **_QWEN_TEXT,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        vision_config={**_QWEN_VISION, "out_hidden_size": 8192},
    ),
    # 3,025 visual tokens of an image, each of four patches.
    "mistral3-24b": lambda: hf.Mistral3Config(),
    # Layers that choose keys by an index, with linear attention and without (transformers 5.24).
    "glm5-next-314b": lambda: hf.Glm5NextConfig(),
    "hy-v4-vl-771b": lambda: hf.HYV4VLConfig(),
}


def measure(name: str) -> dict[str, Any]:
    """Compile one model; run it in a process of its own, for the peak is that of the process.

    Args:
        name: A key of `MODELS`.

    Returns:
        Seconds of each stage, in processor time that other programs do not slow, nodes of the
        graphs and megabytes.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        seconds[stage] = time.process_time() - start
        return result

    imported = _peak_megabytes()
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(MODELS[name](), dtype=torch.bfloat16)
    model.eval()
    layers = model.config.get_text_config().num_hidden_layers
    half = {"activation": 0.5, "retention": 0.5}
    call = timed("inputs", lambda: completed(Call.of(facts_of(model), example_inputs(model))))
    layout = timed("layout", lambda: call.layout)
    captured = timed("capture and analyse", lambda: capture_call(model, call.inputs))
    steps = _steps(captured, layers)
    relaxed = {step.site: RelaxedReduction(step, **half) for step in steps}
    twin = captured.copy()
    # Where keys are chosen by an index, there is no relaxed form and no bias.
    if steps[0].mass_bias:
        timed("insert", lambda: insert_relaxed(twin.graph_module, captured.sites, relaxed, layout))
    again = captured.copy()
    lowered = timed("lower", lambda: lower_call(again, Policy(steps), layout))
    return {
        "layers": layers,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "wall_seconds": time.perf_counter() - started,
        "nodes": len(captured.graph_module.graph.nodes),
        "nodes_lowered": len(lowered.graph.nodes),
        "no_weight_has_values": all(weight.is_meta for weight in lowered.parameters()),
        "peak_megabytes": _peak_megabytes(),
        "imports_megabytes": imported,
    }


def _steps(captured: Captured, layers: int) -> tuple[Reduction, ...]:
    """Return reductions at the projector, after the third layer, and in the middle.

    A site that a model does not have there is the next one that it has.
    """
    assert captured.sites is not None
    blocks = blocks_of(captured.graph_module.graph, "decoder").values()
    bias = 0.0 if any(note_of(block).indexes for block in blocks) else 1.0
    sites = {"projector": 0.5}
    for first, keep in ((2, 0.25), (layers // 2, 0.1)):
        places = (captured.sites[f"decoder.{i}"] for i in range(first, layers))
        sites[next(place.name for place in places if place.available)] = keep
    merge = {"gain": 1.0, "mass_bias": bias, "scores": {"feature_norm": 1.0}}
    return tuple(Reduction(site, keep, **merge) for site, keep in sites.items())


def first_call(layers: int) -> dict[str, float]:
    """Seconds of the first call of a real model, of a later one, and of the model itself."""
    config = SHAPES["llava-1.5-7b"]()
    config.text_config.num_hidden_layers = layers
    for part, width in ((config.text_config, 1024), (config.vision_config, 512)):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = width, 2 * width, 8
    config.text_config.num_key_value_heads, config.text_config.head_dim = 8, 128
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    inputs = example_inputs(model)
    reduced = transform(model, policy=Policy())
    found = {}
    for what, call in (("original", model), ("first", reduced), ("later", reduced)):
        if what == "original":
            # The first call of a process is slower for reasons of its own.
            call(**inputs)
        start = time.process_time()
        call(**inputs)
        found[what] = time.process_time() - start
    return found


def _peak_megabytes() -> float:
    """The most that this process has held, in kilobytes on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main(
    output: Annotated[Path | None, typer.Option(help="File for all results.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only these models.")] = None,
    alone: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what compiling costs."""
    if alone:
        result = first_call(32) if alone == "first call" else measure(alone)
        print(json.dumps(result))
        return
    names = model or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise typer.BadParameter(f"no model {unknown[0]!r}; choose from {', '.join(MODELS)}")
    found = conditions("capture", {"models": names}, torch.device("cpu"))
    found["models"] = {name: _in_a_process(name) for name in names}
    found["first_call_seconds"] = _in_a_process("first call")
    table = Table("model", "layers", "capture", "insert", "lower", "all, s", "peak, MB", "nodes")
    for name, figures in found["models"].items():
        seconds = figures["seconds"]
        stages = [seconds.get(stage) for stage in ("capture and analyse", "insert", "lower")]
        times = (*stages, figures["total_seconds"])
        cells = ["" if value is None else f"{value:.2f}" for value in times]
        nodes = f"{figures['nodes']} -> {figures['nodes_lowered']}"
        peak = f"{figures['peak_megabytes']:.0f}"
        table.add_row(name, str(figures["layers"]), *cells, peak, nodes)
    console = Console()
    console.print(table)
    console.print("calls of a real model, 32 layers:", found["first_call_seconds"])
    if output is not None:
        write_text(output, json.dumps(found, indent=2) + "\n")


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
