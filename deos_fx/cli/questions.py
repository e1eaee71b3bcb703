"""Make the question of the options ``--image`` and ``--prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deos_fx.data import Record

__all__ = ["question_of"]


def question_of(images: Sequence[str], prompt: str, urls: bool) -> Record:
    """Make a record of the options ``--image`` and ``--prompt``."""
    from deos_fx.data.rows import record_of

    row = {"images": list(images), "prompt": prompt}
    return record_of(row, Path(), "--image", urls)
