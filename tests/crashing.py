"""A worker's process whose units of length 3 crash it, for the tests of the local launcher.

It is a module of its own because a process that is spawned imports what it runs.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from prototok.sweep.local import _work as work


def crashing_work(path: str, pipe: Connection, *rest: Any) -> None:
    """Do what a worker does, and read from address 0 where it comes to such a unit."""
    from prototok.sweep.work import Worker

    real = Worker._fit

    def fit(self: Worker, lm: Any, units: list) -> Iterator[str]:
        if any(unit.length == 3 for unit in units):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.string_at(0)
        yield from real(self, lm, units)

    Worker._fit = fit  # type: ignore[method-assign]
    work(path, pipe, *rest)


def stillborn_work(path: str, pipe: Connection, *rest: Any) -> None:
    """End before the first lot, as where an import fails."""
    raise SystemExit(7)
