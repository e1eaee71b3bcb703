"""The processes that share a search: those of torch.distributed, or this one alone.

Every process has the same data and takes the same decisions; only the work on batches is shared
out. Results are put in their places beside those of the others and summed afterwards, in the same
order everywhere, so that several processes compute what one would, bit by bit.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = [
    "Progress",
    "agreeing",
    "any_has",
    "check_equal",
    "computed",
    "is_main",
    "joined",
    "of_main",
    "on_main",
]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage (``presets``, ``steps``, ...), the number done and the total."""

_T = TypeVar("_T")

# Whether this process was interrupted since the last time that all processes met.
_interrupted = threading.Event()


def _number() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _number() > 1 else 0


def is_main() -> bool:
    """Return whether this is the process that writes files and reports progress."""
    return _rank() == 0


def computed(
    items: Sequence[_T], compute: Callable[[_T], Tensor | float], rows: Tensor, *, in_step: bool
) -> Tensor:
    """Compute a row for each item; the processes share the items out.

    Args:
        items: The n items.
        compute: Returns the row of an item.
        rows: Zeros [n, ...], which the rows of this process are written to.
        in_step: Whether all processes have to compute equally often, as they do where they share a
            model: whoever has an item less computes one again, for nothing.

    Returns:
        All n rows, the same in every process.

    Raises:
        KeyboardInterrupt: In all processes, if one of them was interrupted.
    """
    own = range(_rank(), len(items), _number())
    for i in own:
        rows[i] = compute(items[i])
    if in_step and len(own) * _number() < len(items):
        compute(items[-1])
    return joined(rows)


def any_has(flag: bool) -> bool:
    """Return whether a flag is set in one of the processes."""
    return any(_everywhere(flag))


def joined(rows: Tensor) -> Tensor:
    """Fill in the rows that the other processes have computed.

    Args:
        rows: [n, ...]; the rows of items that are not this process' share are 0.

    Returns:
        All n rows, the same in every process.

    Raises:
        KeyboardInterrupt: In all processes, if one of them was interrupted.
    """
    if _number() == 1:
        return rows
    # Ctrl-C reaches processes at different times. If one left, the others would wait for ever, so
    # all learn of it where they meet, and leave together.
    flag = rows.new_tensor([float(_interrupted.is_set())])
    everything = torch.cat([rows.flatten(), flag]).to(_meeting_place(rows))
    # x + 0 = x, so this moves rows and rounds nothing.
    dist.all_reduce(everything)
    if everything[-1].item():
        _interrupted.clear()
        raise KeyboardInterrupt
    return everything[:-1].view_as(rows).to(rows.device)


def of_main(values: Sequence[float]) -> list[float]:
    """Return numbers as the main process has them: for what is measured, such as times."""
    own = torch.tensor(values, dtype=torch.float64)
    return joined(own if is_main() else torch.zeros_like(own)).tolist()


def check_equal(what: str, value: float) -> None:
    """Refuse to go on where processes differ: they would wait for each other for ever.

    Args:
        what: What the value is, for the message.
        value: The value in this process.

    Raises:
        ValueError: In all processes, if it differs.
    """
    found = _everywhere(value)
    if len(set(found)) > 1:
        raise ValueError(
            f"The processes of this search differ: {what}: {found}. Give all of them the same "
            "arguments, and a checkpoint folder that all of them can read."
        )


def _everywhere(value: float) -> list[float]:
    """Return a number of each process."""
    values = torch.zeros(_number(), dtype=torch.float64)
    values[_rank()] = value
    return joined(values).tolist()


def on_main(progress: Progress | None) -> Progress | None:
    """Return what reports progress in this process: nothing does outside of the main one."""
    if progress is None or not is_main():
        return None
    if _number() == 1:
        return progress

    def report(stage: str, done: int, total: int) -> None:
        try:
            progress(stage, done, total)
        except KeyboardInterrupt:
            _interrupted.set()

    return report


@contextmanager
def agreeing() -> Iterator[None]:
    """Let Ctrl-C interrupt several processes together, where they next meet."""
    if _number() == 1 or threading.current_thread() is not threading.main_thread():
        # Case: one process. Ctrl-C works as ever. Other threads cannot be interrupted.
        yield
        return
    _interrupted.clear()
    before: Any = signal.signal(signal.SIGINT, lambda *_: _interrupted.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _meeting_place(rows: Tensor) -> torch.device:
    """Return a device on which the processes can exchange tensors."""
    if rows.device.type == "cpu" and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    # gloo takes tensors of the CPU alone.
    return torch.device("cpu") if dist.get_backend() == "gloo" else rows.device
