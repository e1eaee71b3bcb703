"""A bounded mapping that keeps the most recently used entries."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A bounded, thread-safe mapping that discards the least recently used entries.

    `functools.lru_cache` would keep models among its arguments alive, and cannot look an entry up
    without computing it.

    Args:
        size: The largest number of entries.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """Return the value of a key and mark it as used; None if there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: K, value: V) -> V:
        """Store a value as the most recently used one and return it."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value

    def find(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of a key, made if there is none; two threads may make it at once."""
        # The lock is free while a value is made: that may take long, and may ask for other keys.
        found = self.get(key)
        return self.put(key, make()) if found is None else found

    def items(self) -> list[tuple[K, V]]:
        """Return all entries, the most recently used first."""
        with self._lock:
            return list(reversed(self._entries.items()))
