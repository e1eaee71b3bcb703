"""A mapping that keeps what was used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A bounded mapping for many threads, of which the least recently used entries go.

    `functools.lru_cache` would keep the models alive that are among its arguments, and cannot
    look without computing.

    Args:
        size: Entries that stay.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value of a key, which is now the most recently used; None if there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: K, value: V) -> V:
        """Enter a value as the most recently used; returns it."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value

    def find(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made if there is none; two threads may make it at once."""
        found = self.get(key)
        return self.put(key, make()) if found is None else found

    def items(self) -> list[tuple[K, V]]:
        """All entries, the most recently used first."""
        with self._lock:
            return list(reversed(self._entries.items()))
