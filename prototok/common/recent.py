"""The last few things that were made, by key: the least recently used is let go."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """At most `most` values; of those with a size, as many as `bytes` hold, one at least."""

    def __init__(
        self, most: int, bytes: int | None = None, size_of: Callable[[Value], int] = lambda v: 0
    ) -> None:
        self.most, self.bytes, self._size_of = most, bytes, size_of
        self._kept: dict[Hashable, Value] = {}  # the latest last

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made where it is not kept any more."""
        if key in self._kept:
            value = self._kept.pop(key)
        else:
            self._make_room(self.most - 1, self.bytes)  # before there are both
            value = make()
        self._kept[key] = value
        self._make_room(self.most, self.bytes)
        return value

    def values(self) -> list[Value]:
        """Return what is kept, the latest last."""
        return list(self._kept.values())

    def clear(self) -> None:
        """Let everything go."""
        self._kept.clear()

    def _make_room(self, most: int, bytes: int | None) -> None:
        while len(self._kept) > most or self._too_large(bytes):
            del self._kept[next(iter(self._kept))]

    def _too_large(self, bytes: int | None) -> bool:
        if bytes is None or len(self._kept) < 2:
            return False
        return sum(map(self._size_of, self._kept.values())) > bytes
