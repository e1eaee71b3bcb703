"""What the benchmarks share: shapes of models, the clock, and what to say of the machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from deos_fx import __version__, reference
from deos_fx.exporters.fuse import fuse
from deos_fx.exporters.graphs.exportable import Exportable
from deos_fx.exporters.manifest import write_graphs
from deos_fx.exporters.session import Session
from deos_fx.exporters.session import open as open_session
from deos_fx.files import write_text
from deos_fx.models.facts import facts_of

__all__ = [
    "DTYPES",
    "SHAPES",
    "WARM_UP",
    "Device",
    "Dtype",
    "build_inputs",
    "build_model",
    "conditions",
    "device_of",
    "in_turns",
    "measured",
    "now",
    "onnx_session",
]

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
WARM_UP = 2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Device = StrEnum("Device", ["cpu", "cuda"])
Dtype = StrEnum("Dtype", ["fp32", "fp16", "bf16"])


# *** shapes ***


def _llava_1_5(width: int, inner: int, layers: int, heads: int, blocks: int = 24) -> LlavaConfig:
    """LLaVA-1.5 as liuhaotian's checkpoints have it: CLIP ViT-L/14 at 336 pixels and a Vicuna."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
    )


def _tiny() -> LlavaConfig:
    """64 visual tokens, 4 decoder layers: to see whether the command works somewhere."""
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=48,
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=127,
        image_seq_length=64,
        vision_feature_layer=-2,
    )


SHAPES: Mapping[str, Callable[[], LlavaConfig]] = {
    "llava-tiny": _tiny,
    # The same 576 visual tokens, small enough for one thread of a CPU.
    "llava-1.5-small": lambda: _llava_1_5(1024, 2752, 12, 8, blocks=6),
    "llava-1.5-eighth": lambda: _llava_1_5(2048, 5504, 16, 16),
    "llava-1.5-7b": lambda: _llava_1_5(4096, 11008, 32, 32),
    "llava-1.5-13b": lambda: _llava_1_5(5120, 13824, 40, 40),
}
"""Configs of the shapes that get random weights; ``reference`` brings its trained ones."""


def build_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model: `reference` with its trained weights, others with random ones.

    Raises:
        ValueError: If there is no such shape.
    """
    if shape == "reference":
        trained: Any = reference.load()[0]
        return trained.to(device, dtype).requires_grad_(False)
    if shape not in SHAPES:
        raise ValueError(f"no shape {shape!r}; choose from reference, {', '.join(SHAPES)}")
    torch.manual_seed(0)
    with device:
        model = LlavaForConditionalGeneration._from_config(SHAPES[shape](), dtype=dtype)
    return model.eval().requires_grad_(False)


def build_inputs(
    model: PreTrainedModel, batch: int, text: int, images: int = 1
) -> dict[str, Tensor]:
    """Prompts of images and random words: ``input_ids`` and ``pixel_values``, no padding."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    vision, words = config.vision_config, config.get_text_config().vocab_size
    ids = torch.randint(words - 1, (batch, text), generator=generator)
    # The image token itself must not be among the words.
    ids += ids >= config.image_token_id
    visual = images * facts_of(model).signature.visual_tokens
    image = torch.full((batch, visual), config.image_token_id)
    pixels = torch.randn(
        (batch * images, vision.num_channels, vision.image_size, vision.image_size),
        generator=generator,
    )
    return {
        "input_ids": torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


# *** ONNX Runtime ***


def onnx_session(
    module: nn.Module, inputs: Mapping[str, Tensor], folder: Path
) -> tuple[Session, int]:
    """Export a module with the fusions of our exports, and open it in ONNX Runtime.

    Args:
        module: The module.
        inputs: Its inputs, on the device that it is to be fast on; others have the same shapes.
        folder: Where to write it.

    Returns:
        The session, which takes tensors on the CPU, and the number of nodes of its graph.
    """
    device = next(iter(inputs.values())).device
    graphs = {"module": Exportable(module, dict(inputs), {name: {} for name in inputs}).export()}
    fuse(graphs, device.type)
    own = Path(tempfile.mkdtemp(dir=folder))
    write_graphs(graphs, own)
    nodes = sum(1 for _ in graphs["module"].graph.all_nodes())
    return open_session(own / "module.onnx", device), nodes


# *** a command ***


def measured(
    measure: Callable[[Callable[[Mapping[str, Any]], None]], dict[str, Any]],
    output: Path,
    console: Console,
) -> dict[str, Any]:
    """Run what a benchmark measures, and write the results as JSON as often as it has some.

    Args:
        measure: Takes a function that writes the results so far.
        output: The file.
        console: Where the file is named at the end.

    Raises:
        typer.BadParameter: If a setting is not possible here, or the file cannot be written.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        results = measure(lambda found: write_text(output, json.dumps(found, indent=1) + "\n"))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"Wrote {output}", highlight=False)
    return results


# *** the machine ***


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: If it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is 'cuda', but torch {torch.__version__} finds no GPU here; give --device cpu"
        )
    return torch.device(name)


def now(device: torch.device) -> float:
    """Seconds, once everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    advance: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Milliseconds of each call in every round: one after the other, back and forth.

    Calls that are to be compared take turns, so that all see the same machine. `WARM_UP` rounds
    come first and are not counted.

    Args:
        calls: By name, what to call.
        rounds: How often each is timed.
        device: Where they run.
        advance: Told of progress.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            start = now(device)
            calls[name]()
            if i >= WARM_UP:
                times[name].append(1e3 * (now(device) - start))
        advance(i + 1, WARM_UP + rounds)
    return times


def conditions(benchmark: str, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What another machine needs to measure the same, and what this one is."""
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "settings": dict(settings),
        "hardware": _hardware(device),
        "versions": {"python": platform.python_version(), "deos-fx": __version__, **_versions()},
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Above the number of threads, something else was running too.
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return hardware


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The checkout that this file is in, ``-dirty`` if it has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
