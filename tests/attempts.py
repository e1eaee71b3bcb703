"""How the rows of the table of misuse are tried: what they refer to, and what is done with them."""

from __future__ import annotations

import json
import math
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import deos_fx
from deos_fx.cli.app import app
from deos_fx.contents import RECORD, own_hash
from deos_fx.exporters.manifest import FORMAT, VERSION, read_manifest
from deos_fx.forms.relaxed import RelaxedReduction
from deos_fx.passes.search.objective import AugmentedLagrangian
from deos_fx.passes.search.state import SearchState
from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import ModelSignature, Policy
from deos_fx.policy.reduction import Reduction
from deos_fx.policy.tier import Tier

SPACE = {"first_layer": 2, "position": "keep", "biased": False, "dropped": 48}
WHOLE: dict[str, Any] = {
    "deos_fx": FORMAT,
    "version": VERSION,
    "packages": {"torch": "2.13.0"},
    "opset": 18,
    "model": {"model_type": "a", "vision_layers": 2, "decoder_layers": 4, "visual_tokens": 64},
    "device": "cpu",
    "dtype": "float32",
    "graphs": ["prefill", "extend", "decode"],
    "inputs": ["input_ids", "pixel_values"],
    "image_token": 3,
    "images": 1,
    "image_tokens": 64,
    "ends_in_image": False,
    "pixels": [1, 3, 32, 32],
    "further_pixels": {},
    "coordinates": 0,
    "spaces": [SPACE],
}
"""A manifest that is read."""


class World:
    """What the rows of the table refer to.

    Args:
        folder: An empty folder, the current one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> dict[str, Any]:
        model = tiny.tiny_llava(2)
        one = Policy((Reduction("projector", 8, scores={"novelty": 1.0}),))
        public = {name: getattr(deos_fx, name) for name in deos_fx.__all__}
        ours = {"Tier": Tier, "ModelSignature": ModelSignature, "Learned": Learned}
        return {
            **public,
            **ours,
            "torch": torch,
            "nan": math.nan,
            "model": model,
            "inputs": tiny.inputs(model),
            "reduced": deos_fx.transform(model, policy=one),
        }

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    @cached_property
    def model_folders(self) -> None:
        """Folders of models that commands are given: whole, damaged and hostile ones."""
        config = json.dumps(self.names["model"].config.to_dict())
        for name in ("my-llava", "damaged", "pickled"):
            self.write(f"{name}/config.json", config)
        self.write("damaged/model.safetensors", b"no tensors")
        self.write("pickled/pytorch_model.bin", b"no pickle")
        self.write("deep/config.json", "[" * 100_000)
        self.write("listed/config.json", "[1, 2]")
        typed = self.names["model"].config.to_dict() | {"image_seq_length": "many"}
        self.write("typed/config.json", json.dumps(typed))
        self.write("unread/config.json", config)
        kind = {"image_processor_type": "CLIPImageProcessor"}
        processor = {"processor_class": "LlavaProcessor", "image_processor": kind}
        self.write("unread/processor_config.json", json.dumps(processor))
        self.write("unread/tokenizer.json", "{")
        self.write("bad.json", '{"deos_fx": "policy", "version": 1, "reductions": [{"site": 3}]}')
        self.write("lines.jsonl", "{}\n")
        Image.new("RGB", (9, 9)).save(self.folder / "a.png")
        self.write("asked.jsonl", '{"image": "a.png", "prompt": "What is this?"}\n')


def evaluate(given: str, world: World) -> object:
    return eval(given, world.names)


def read_policy(given: str, world: World) -> object:
    return Policy.load(world.write("policy.json", eval(given)))


def read_reduction(given: str, world: World) -> object:
    text = f'{{"deos_fx": "policy", "version": 1, "reductions": [{given}]}}'
    return Policy.load(world.write("policy.json", text))


def learned_policy(path: Path) -> Policy:
    """Save a policy with a learned part."""
    policy = Policy((Reduction("projector", 8, learned=Learned({"probe": torch.arange(4.0)})),))
    policy.save(path)
    return policy


def read_learned(given: str, world: World) -> object:
    """Load a policy whose learned parts are other ones: bytes, or tensors by name."""
    path = world.folder / "learned/policy.json"
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".safetensors")
    # An earlier row's may be tensors that a policy does not write over.
    beside.unlink(missing_ok=True)
    learned_policy(path)
    parts = eval(given, {"torch": torch})
    if isinstance(parts, bytes):
        beside.write_bytes(parts)
    elif parts is None:
        beside.unlink()
    else:
        save_file(parts, beside)
    return Policy.load(path)


def read_export(given: str, world: World) -> object:
    manifest = world.write(f"export/{RECORD}", json.dumps(WHOLE | json.loads(f"{{{given}}}")))
    return read_manifest(manifest.parent)


def search_state() -> SearchState:
    """Make the state of a search at one site before its first step."""
    start = Reduction("projector", 0.5, scores={"feature_norm": 1.0})
    reductions = {"projector": RelaxedReduction(start, activation=1.0, retention=0.5)}
    return SearchState.start(reductions, AugmentedLagrangian({"flops": 2.0}), {"steps": 9})


def saved_search(folder: Path, steps: int = 3) -> None:
    """Take some steps, and save the state."""
    state = search_state()
    for i in range(steps):
        for parameter in state.parameters:
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        entry = {"step": i + 1, "task": math.nan, "finite": True, "not_finite": [3]}
        entry |= {"gate_temperature": 0.5, "flops": 3.0, "multiplier_flops": 0.0}
        state.history.append(entry | {"keep": {"projector": 0.5}})
        state.consider(1.0)
    state.save(folder)


def read_search(given: str, world: World) -> object:
    folder = world.folder / "checkpoint"
    saved_search(folder)
    path = folder / "search.json"
    record = json.loads(path.read_text()) | json.loads(f"{{{given}}}")
    # What is checked beyond damage: somebody may have written the hash as well.
    path.write_text(json.dumps(record | {"record": own_hash(record, "record")}))
    return search_state().resume(folder)


class Failed(Exception):
    """A command ended with exit code 1 and a line."""


def run_command(given: str, world: World) -> object:
    world.model_folders  # noqa: B018 - makes the folders
    result = CliRunner().invoke(app, shlex.split(given)[1:])
    line, hint = result.output.strip().splitlines()
    assert (result.exit_code, hint[:16]) == (1, "deos-fx --debug ")
    raise Failed(line.removeprefix("Error: "))
