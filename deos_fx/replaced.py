"""Replace functions of other packages for one thread at a time, and put them back.

While any thread is inside `replaced`, the whole process finds the replacement under the function's
name. The caller must write it so that it acts in its own thread only and passes every other call to
the original; threads that run plain torch code, or other models, then never notice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Replacement", "replaced"]

Replacement = tuple[Any, str, Callable[[Any], Any]]
"""The owner of a function (a module, a class or a table), its name there, and a callable that makes
the replacement from the original."""

_MISSING = object()


@dataclass
class _Place:
    """A place in which a function is replaced.

    Attributes:
        own: The original entry of the owner itself; `_MISSING` where a class inherits it.
        replacement: The present entry.
        users: Number of callers that are inside.
    """

    own: Any
    replacement: Any
    users: int = 1


_LOCK = threading.Lock()
_PLACES: dict[tuple[int, str], _Place] = {}


@contextlib.contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Replace functions while inside; the last thread to leave puts the originals back.

    Args:
        replacements: The functions to replace. Where another thread has already replaced a
            function, that replacement stays, so all replacements made for one place must behave
            alike, whichever thread made them.
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
        # Case: replaced already, by another thread or further out in this one.
        place.users += 1
        return
    # The replacement calls what the name finds, which may be inherited. Put back is the owner's own
    # entry, or none.
    original = owner[name] if isinstance(owner, dict) else getattr(owner, name)
    place = _Place(_own(owner, name), make(original))
    _put(owner, name, place.replacement)
    _PLACES[id(owner), name] = place


def _leave(owner: Any, name: str) -> None:
    place = _PLACES[id(owner), name]
    place.users -= 1
    if place.users:
        # Case: others are still inside.
        return
    del _PLACES[id(owner), name]
    # Leave the entry alone if other code has replaced it in the meantime.
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
