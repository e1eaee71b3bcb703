"""Tell shares from numbers: the float 1.0 is all tokens, the int 1 is one token.

Python calls the two equal, and JSON has no type for them, so every place that compares, writes or
reads them asks this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

__all__ = ["read_keep", "told_apart", "write_keep", "write_share"]


_AMOUNTS = {"keep", "visual_tokens", "flops", "kv_cache"}
"""Fields that hold a share as a float, and a number as an int."""


def told_apart(item: Any) -> tuple[tuple[bool, Any], ...]:
    """Return the fields of a dataclass such that a share and a number are never equal.

    Only counts and limits mean something else as a float; a gain of 0 and of 0.0 stay equal.
    """
    values = ((entry.name, getattr(item, entry.name)) for entry in fields(item))
    return tuple((name in _AMOUNTS and isinstance(value, float), value) for name, value in values)


def write_share(amount: int | float) -> str:
    """Write an amount for people: 18, 0.125, and 1.0 for all."""
    if isinstance(amount, int):
        return str(amount)
    short = f"{amount:.4g}"
    return "1.0" if short == "1" else short


def write_keep(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields for JSON, in which a share is called ``share`` and a number ``keep``."""
    share = isinstance(values.get("keep"), float)
    return {("share" if name == "keep" and share else name): x for name, x in values.items()}


def read_keep(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields from JSON, which a schema has checked, under the names that Python has.

    Files from before there was ``share`` have shares under ``keep``, written with a point.
    """
    given = dict(values)
    if "share" in given:
        # Another program may have written 1.0 as 1.
        given["keep"] = float(given.pop("share"))
    return given
