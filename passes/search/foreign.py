"""Notice the checkpoint of another search before anything is captured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deos_fx.inputs.call import Call
from deos_fx.passes.search.state import RECORD, RECORD_BYTES
from deos_fx.policy.policy import ModelSignature
from deos_fx.reading import read_json

__all__ = ["check_checkpoint", "fingerprint"]


def check_checkpoint(folder: str | os.PathLike[str], seed: int, problem: Mapping[str, Any]) -> None:
    """Refuse a folder with states of a search of another model, other data or another seed.

    What is learned later, such as the start of the steps, is compared when a state is resumed.

    Args:
        folder: The folder of a checkpoint, which need not exist.
        seed: Seed of the search.
        problem: Its `fingerprint`.

    Raises:
        ValueError: If a state in the folder is of another search.
    """
    # Through JSON, because that turns tuples into lists.
    own = json.loads(json.dumps({**problem, "seed": seed}))
    for path in sorted(Path(folder).rglob(RECORD)):
        try:
            settings = read_json(path, RECORD_BYTES)["settings"]
            other = [name for name, value in own.items() if settings[name] != value]
        except (ValueError, KeyError, TypeError):
            # Case: damaged, or something else. Resuming says what is wrong with it.
            continue
        if other:
            words = {"model": "model", "seed": "seed"}
            what = " and ".join(dict.fromkeys(words.get(name, "data") for name in other))
            raise ValueError(
                f"{os.fspath(folder)} holds another search (other {what}). Give another checkpoint "
                "folder, or delete this one."
            )


def fingerprint(signature: ModelSignature, training: Sequence[Call]) -> dict[str, Any]:
    """Describe the problem of a search, so that a checkpoint of another one is recognised.

    Args:
        signature: The model's.
        training: The calls of the batches of the steps, without labels.
    """
    return {
        "model": str(signature),
        "batches": [list(call.inputs["input_ids"].shape) for call in training],
        "sums": [_sums(call.inputs) for call in training],
    }


def _sums(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return the sum of every tensor among inputs, images included, by name."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    # As text, in which NaN equals itself.
    return {name: repr(value.double().sum().item()) for name, value in sorted(tensors.items())}
