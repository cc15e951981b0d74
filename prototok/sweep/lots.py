"""Choose the units a worker gets next, and retry or give up those whose worker died."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit

CPU_POSITIONS, CUDA_POSITIONS = 4096, 1 << 17  # rows × N of a lot


class Lots:
    """A queue of lots: units that are fitted in one call, all of one `group()`.

    Lots hold up to `positions`, and where that leaves a group fewer than four lots a worker, less,
    so that workers end together; but an eighth of it, as a step of few rows costs like one of many.
    A lot whose worker died is halved and tried again. A unit that kills its worker `attempts`
    times, alone in its lot, is recorded as failed.
    """

    def __init__(
        self, run: RunFolder, units: Iterable[Unit], workers: int, positions: int, attempts: int
    ) -> None:
        self.run, self.attempts = run, attempts
        self.deaths: dict[str, int] = {}
        self.queue: deque[list[Unit]] = deque()
        groups: dict[tuple, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.group(), []).append(unit)
        # Models in turn, so that a worker seldom loads one; what takes longest first.
        for group in sorted(groups.values(), key=lambda found: found[0].model):
            share = sum(unit.positions for unit in group) // (4 * workers)
            most = max(positions // 8, min(positions, share))
            lot: list[Unit] = []
            for unit in sorted(group, key=lambda unit: -unit.length):
                if lot and (unit.alone or sum(u.positions for u in lot) + unit.positions > most):
                    self.queue.append(lot)
                    lot = []
                lot.append(unit)
            self.queue.append(lot)

    def __len__(self) -> int:
        return len(self.queue)

    def take(self, model: str | None = None) -> list[Unit] | None:
        """Return the next lot, of `model` (what the worker has loaded) where there is one."""
        for i, lot in enumerate(self.queue):
            if lot[0].model == model:
                del self.queue[i]
                return lot
        return self.queue.popleft() if self.queue else None

    def put_back(self, lot: list[Unit]) -> None:
        """Take back what is left of a lot whose worker was stopped."""
        left = [unit for unit in lot if not self.run.is_done(unit.key)]
        if left:
            self.queue.appendleft(left)

    def died(self, lot: list[Unit], how: str) -> None:
        """Take back a lot whose worker died."""
        left = [unit for unit in lot if not self.run.is_done(unit.key)]
        if len(left) == 1:
            key = left[0].key
            self.deaths[key] = self.deaths.get(key, 0) + 1
            if self.deaths[key] >= self.attempts:
                self.run.fail(key, f"its worker died: {how}", self.deaths[key])
                return
        half = (len(left) + 1) // 2
        self.queue.extendleft(part for part in (left[half:], left[:half]) if part)


def shard_of(units: dict[str, Unit], shard: str | None) -> list[Unit]:
    """Return the units of shard "i/n" (i from 0), by their keys; all of them for None.

    Raises:
        ValueError: not two integers with 0 ≤ i < n.
    """
    if shard is None:
        return list(units.values())
    i, slash, n = shard.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise ValueError(f"shard: {shard!r} is not i/n with i from 0 to n − 1")
    return [unit for key, unit in units.items() if int(key, 16) % int(n) == int(i)]


def to_do(run: RunFolder, shard: str | None, retry_failed: bool) -> list[Unit]:
    """Return the planned units of a shard that are neither done nor, unless retried, failed."""
    mine = shard_of(run.units(), shard)
    if retry_failed:
        run.forget_failures(unit.key for unit in mine)
    over = run.done() | set(run.failures()["key"].to_pylist())
    return [unit for unit in mine if unit.key not in over]
