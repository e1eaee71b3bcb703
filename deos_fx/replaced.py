"""Replace functions of other packages for one thread at a time, and put them back.

While anyone is inside, the whole process finds the replacement under the function's name. It is
made by the caller to act for its own thread alone and to hand every other call to the original, so
threads that run plain torch code, or models of their own, never notice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Replacement", "replaced"]

Replacement = tuple[Any, str, Callable[[Any], Any]]
"""Where a function is (a module, a class or a table), its name, and what makes, of the original,
what stands there meanwhile."""

_MISSING = object()


@dataclass
class _Place:
    """What stands somewhere while it is replaced.

    Attributes:
        own: What was there; `_MISSING` where a class inherits it.
        replacement: What is there now.
        users: How many are inside.
    """

    own: Any
    replacement: Any
    users: int = 1


_LOCK = threading.Lock()
_PLACES: dict[tuple[int, str], _Place] = {}


@contextlib.contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Replace functions while inside; the last thread to leave puts back what was there.

    Args:
        replacements: What to replace. Where another thread has replaced a function already, its
            replacement stays: all that are made for one place must do the same for any thread.
    """
    entered: list[tuple[Any, str]] = []
    try:
        with _LOCK:
            for owner, name, make in replacements:
                _enter(owner, name, make)
                entered.append((owner, name))
        yield
    finally:
        with _LOCK:
            for owner, name in reversed(entered):
                _leave(owner, name)


def _enter(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    place = _PLACES.get((id(owner), name))
    if place is not None:
        place.users += 1
        return
    original = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    place = _Place(_own(owner, name), make(original))
    _put(owner, name, place.replacement)
    _PLACES[id(owner), name] = place


def _leave(owner: Any, name: str) -> None:
    place = _PLACES[id(owner), name]
    place.users -= 1
    if place.users:
        return
    del _PLACES[id(owner), name]
    # What somebody else has put there in the meantime is theirs.
    if _own(owner, name) is place.replacement:
        _put(owner, name, place.own)


def _own(owner: Any, name: str) -> Any:
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _MISSING)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    elif value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
