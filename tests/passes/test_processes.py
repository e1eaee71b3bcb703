"""Searches that several processes share, that are killed and go on, and models that are sharded."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import searches
import torch
from searches import labelled, short_search, small_model, summary
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from deos_fx.passes.search import processes
from deos_fx.passes.search import run as run_module
from deos_fx.passes.search.batches import SearchBatch
from deos_fx.passes.search.problem import SearchProblem
from deos_fx.passes.search.search import search
from deos_fx.policy.budget import Budget


@pytest.fixture(scope="module")
def whole() -> Iterator[str]:
    """What one process finds when nothing disturbs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in searches.SHORT.items():
            patch.setattr(run_module, name, value)
        yield summary(short_search())
    torch.set_num_threads(threads)


def test_two_processes_find_what_one_finds(whole: str, tmp_path: Path) -> None:
    started = [searches.start(searches.shared_search, rank, tmp_path) for rank in range(2)]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert main["whole"] == other["whole"] == whole
    # Three batches: where two processes share a model, one of them has to run one again.
    assert main["sharded"] == other["sharded"] == whole
    # Only the main process reports, and it writes the only checkpoint.
    assert "steps" in main["seen"] and other["seen"] == []
    assert (tmp_path / "checkpoint" / "steps" / "search.json").exists()
    # A signal in one of them ends both, at the next place where they meet.
    assert main["cut"] == other["cut"]
    history, expected = (json.loads(text)[3] for text in (main["cut"], whole))
    assert 2 <= len(history) < len(expected)
    # The static loss of the last step may not have been measured.
    tasks = [step["task"] for step in history]
    assert tasks == [step["task"] for step in expected[: len(tasks)]]


# In the second of two places, and in the final steps; states are written after every second step.
@pytest.mark.parametrize(("stage", "step", "left"), [("place 2 of 2", 3, 0), ("steps", 3, 3)])
def test_a_killed_search_goes_on_where_it_was(
    whole: str, tmp_path: Path, stage: str, step: int, left: int
) -> None:
    process = searches.start(searches.killed_search, tmp_path, stage, step)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # A kill in the middle of writing leaves a hidden folder.
    (tmp_path / "steps" / ".deos-fx-12345678").mkdir(parents=True)
    stages: list[str] = []
    found = short_search(checkpoint=tmp_path, progress=lambda now, *_: stages.append(now))
    assert summary(found) == whole
    # What was finished is not run again.
    assert "place 1 of 2" not in stages
    assert stages.count(stage) == left
    files = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert files == ["search.json", "step-5.safetensors"]


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
def test_models_of_the_first_fsdp_are_refused() -> None:
    wrapped: Any = FullyShardedDataParallel(small_model(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="call torch.distributed.fsdp.fully_shard on each layer"):
        search(wrapped, labelled(small_model()), budget=Budget(flops=0.5))


def test_one_process_shares_with_nobody() -> None:
    rows = torch.arange(3.0)
    assert processes.joined(rows) is rows
    filled = processes.computed([1.0, 2.0], lambda item: 2 * item, torch.zeros(2), in_step=True)
    assert filled.tolist() == [2.0, 4.0] and not processes.any_has(False)
    assert processes.of_main([0.1]) == [0.1]
    processes.check_equal("steps", 3)


def test_batches_are_moved_when_they_are_used() -> None:
    """A device without numbers stands for one with little memory."""
    model = small_model()
    problem = SearchProblem.of(model, iter(labelled(model)), Budget(flops=0.5))
    batch = problem.training[0]
    assert isinstance(batch, SearchBatch)
    ids = batch.call.inputs["input_ids"]
    model.to("meta")
    assert all(x.device.type == "meta" for x in batch.inputs.values() if torch.is_tensor(x))
    assert ids.device.type == batch.target.positions.device.type == "cpu"
