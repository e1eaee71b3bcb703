"""Notice the checkpoint of another search before anything is captured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deos_fx.passes.search.state import RECORD, RECORD_BYTES
from deos_fx.reading import read_json

__all__ = ["check_checkpoint"]


def check_checkpoint(
    folder: str | os.PathLike[str], seed: int, fingerprint: Mapping[str, Any]
) -> None:
    """Refuse a folder with states of a search of another model, other data or another seed.

    What is learned later, such as the start of the steps, is compared when a state is resumed.

    Args:
        folder: The folder of a checkpoint, which need not exist.
        seed: Seed of the search.
        fingerprint: `SearchProblem.fingerprint`.

    Raises:
        ValueError: If a state in the folder is of another search.
    """
    # Through JSON, because that turns tuples into lists.
    own = json.loads(json.dumps({**fingerprint, "seed": seed}))
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
