"""Short searches on a tiny model, also in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from tiny import inputs, shard, tiny_llava
from torch import distributed as dist
from torch import multiprocessing

from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.search import search
from deos_fx.policy.budget import Budget
from deos_fx.results.search_result import SearchResult


def _at_once(*_: Any) -> list[int]:
    """Begin with as many tokens as the limits allow."""
    return [1]


SHORT = {"_TRIAL": 3, "_VARIATIONS": 1, "_CHECKPOINT_EVERY": 2, "factors": _at_once}
"""Settings of `deos_fx.passes.search.run` that make a search short."""


def small_model() -> Any:
    return tiny_llava(layers=2)


def labelled(model: Any, number: int = 4, prompts: int = 2) -> list[dict[str, Any]]:
    """Make batches that differ in their tokens and images; the last two tokens are labels."""
    data = []
    for i in range(number):
        batch = inputs(model, batch=prompts, seed=i)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
        data.append(batch)
    return data


def short_search(model: Any = None, **settings: Any) -> SearchResult:
    """Search two places for some steps, and go on at the better one."""
    model = small_model() if model is None else model
    settings = {"steps": 5, "sites": ["projector", "decoder.0"], **settings}
    # Few prompts in a batch, so that a step takes three.
    return search(model, labelled(small_model()), budget=Budget(flops=0.6), **settings)


def summary(result: SearchResult) -> str:
    """Write down everything that a search has found, with all digits."""
    losses = [[candidate.source, candidate.loss] for candidate in result.candidates]
    policy = result.policy.to_json()
    learned = [step.learned.digest for step in result.policy.reductions]
    return json.dumps([policy, learned, losses, result.history, result.relaxed_loss])


def killed_search(checkpoint: Path, stage: str, step: int) -> None:
    """Search until a step, and be killed there."""

    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, step):
            os.kill(os.getpid(), signal.SIGKILL)

    _make_short()
    short_search(checkpoint=checkpoint, progress=progress)


def shared_search(rank: int, folder: Path) -> None:
    """Search as one of two processes, and write down what was found.

    Once with a model that each of them has, once it is interrupted, by a signal that only the main
    process gets, and once with a model that FSDP shards over both.
    """
    _make_short()
    settings = {"rank": rank, "world_size": 2}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", **settings)
    seen: list[str] = []

    def interrupt(now: str, done: int, total: int) -> None:
        if (now, done) == ("steps", 2):
            raise KeyboardInterrupt

    found = {
        "whole": short_search(
            progress=lambda now, *_: seen.append(now), checkpoint=folder / "checkpoint"
        ),
        "cut": short_search(progress=interrupt),
        "sharded": short_search(shard(small_model())),
    }
    results = {name: summary(result) for name, result in found.items()}
    (folder / f"{rank}.json").write_text(json.dumps(results | {"seen": seen}))
    dist.destroy_process_group()


def start(target: Any, *arguments: Any) -> Any:
    """Start a process that does not share the state of this one."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def _make_short() -> None:
    torch.set_num_threads(1)
    for name, value in SHORT.items():
        setattr(run_module, name, value)
