"""The loop: groups from a queue through the slots to their results."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prototok.common.allocator import keep_freed_memory
from prototok.common.shown import shapes
from prototok.fitting.engine.basis import with_basis
from prototok.fitting.engine.buckets import Bucket, make_buckets
from prototok.fitting.engine.rows import Group
from prototok.fitting.engine.runner import Poll, StepRunner, step_runner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots


@dataclass(frozen=True)
class Finished:
    """A group that ended: the vectors that scored, on the CPU, and what it took."""

    group: Group
    vectors: list[Tensor]  # e (n_e, K, d) and, where there is one, m (n_m, 1, d); fp32
    correct: list[int]  # right tokens in the batch it was fitted in, row by row
    steps: int
    seconds: float  # a row's share of the time the batch took
    failed: bool = False  # a loss or a gradient was not finite; the vectors are those before


@dataclass(frozen=True)
class Refused:
    """Why a group that reached its goal goes on.

    margin  what to clear next; less than it had: half as much again as that
    exact   all of its rows are as right as the recipe asks; it is the margin that is too small
    """

    margin: float
    exact: bool


def _left(row: int) -> None:
    """Return None, the vectors of a row that is no longer in flight."""


@dataclass(frozen=True)
class FitEvent:
    """What a callback of `fast_fit` sees after each look at the device.

    rows    (R,) places in the results (text × seeds + seed) of the rows in flight
    steps   (R,) updates made before this score
    loss    (R,) nats, summed over the row's targets; correct (R,) and margin (R,) likewise by row
    best_of returns the best vectors so far of a row, (slots, d) fp32 on the CPU, read from the
            device when it is asked, during the callback; None of a row that has left
    """

    rows: Tensor
    steps: Tensor
    loss: Tensor
    correct: Tensor
    margin: Tensor
    best_of: Callable[[int], Tensor | None] = field(default=_left, repr=False)

    __repr__ = shapes

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"best_of": _left}  # what is sent elsewhere has no device to ask


# Updates between two looks at the mean of a group that goes on cold.
_LOOK = 5


def by_row(vectors: list[Tensor], rows: int) -> list[Tensor]:
    """Return the vectors (slots, d) of each of a group's `rows`, from its e and m."""
    parts = [part.expand(rows, -1, -1) if len(part) == 1 else part for part in vectors]
    return list(torch.cat(parts, dim=1))


def run(
    setup: Setup,
    groups: list[Group],
    confirm: Callable[[list[Finished]], list[Refused | None]],
    observe: Callable[[FitEvent], None],
) -> Iterator[Finished]:
    """Fit all groups and yield each as it ends, bucket by bucket, the longest first.

    Groups that reached the recipe's goal between two looks are shown to `confirm`, which returns
    None for each that holds. One that does not goes on until it clears the margin asked for, or
    half as much again as its own where that is more already, or until its updates are spent. One
    whose margin alone is too small goes on for a quarter of the updates that it had made when that
    was first so, and not into a new cycle, hot again: it is exact. Where such a group goes on cold,
    the mean of what it passes through is shown to `confirm` as well, every few updates, and is what
    the group ends with if it holds: it clears the rounding sooner than the vectors themselves.
    """
    if setup.lm.device.type == "cpu":
        keep_freed_memory()
    setup = with_basis(setup)
    for bucket in make_buckets(setup, groups):
        yield from _run_bucket(setup, bucket, confirm, observe)


def _run_bucket(
    setup: Setup,
    bucket: Bucket,
    confirm: Callable[[list[Finished]], list[Refused | None]],
    observe: Callable[[FitEvent], None],
) -> Iterator[Finished]:
    queue = deque(bucket.groups)
    # A group of more rows than a forward takes stands alone, and its rows take turns.
    rows = max(bucket.rows, *(len(group.rows) for group in queue), 0)
    room = Room(rows, min(rows, len(queue)), bucket.length)
    slots = Slots(setup, room, queue[0].share)
    runner = step_runner(setup.lm, slots, bucket.rows)
    seconds: dict[int, float] = {}
    until: dict[int, int] = {}  # step at which an exact group is taken as it is, by its index
    looked: dict[int, int] = {}  # step of the last look at a refused group or its mean
    clock = time.perf_counter()
    try:
        while queue or slots.groups:
            entering, rows = [], slots.rows
            while queue and (
                rows == 0 or rows + len(queue[0].rows) <= runner.rows_per_forward
            ):  # fmt: skip
                entering.append(queue.popleft())
                rows += len(entering[-1].rows)
            if entering:
                with runner.changing():
                    slots.admit(entering)
            runner.advance(runner.burst)
            poll = runner.poll()
            clock, before = time.perf_counter(), clock
            share = (clock - before) / slots.rows
            for group in slots.groups:
                seconds[group.index] = seconds.get(group.index, 0.0) + share
            if poll is None:
                continue
            observe(_event(poll, runner))
            place = {group.index: g for g, group in enumerate(slots.groups)}
            ending = poll.done | poll.spent | poll.failed
            for p, group in enumerate(poll.groups):
                if group.index in until:
                    ending[p] |= int(poll.step[p]) >= until[group.index]
            ended = [
                (p, g, _finished(poll, p, seconds, runner.best_of(g)))
                for p in ending.nonzero()[:, 0].tolist()
                # Others left after the poll before.
                if (g := place.get(poll.groups[p].index)) is not None
            ]
            means = [
                (g, _finished(poll, p, seconds, *runner.mean_of(g)))
                for p in (poll.cold & ~ending).nonzero()[:, 0].tolist()
                if (index := poll.groups[p].index) in looked
                and int(poll.step[p]) >= looked[index] + _LOOK
                and (g := place.get(index)) is not None
            ]
            shown = [one for *_, one in ended] + [one for _, one in means]
            answers = confirm(shown) if shown else []
            leaving = []
            for (g, finished), refused in zip(means, answers[len(ended) :], strict=True):
                looked[finished.group.index] = finished.steps
                if refused is None:
                    leaving.append(g)
                    yield finished
            for (p, g, finished), refused in zip(ended, answers[: len(ended)], strict=True):
                index, margin = finished.group.index, float(poll.best_margin[p])
                last = index in until and finished.steps >= until[index]
                holds = refused is None or (refused.exact and last)
                if refused is None or holds or finished.failed or poll.spent[p]:
                    leaving.append(g)
                    yield finished
                    continue
                if not refused.exact:
                    until.pop(index, None)
                elif index not in until:
                    most = finished.steps + max(1, finished.steps // 4)
                    end = setup.recipe.end_of_cycle(finished.steps, finished.group.length)
                    until[index] = min(most, end)
                looked[index] = finished.steps
                asked = refused.margin
                runner.reopen(g, max(0.05, asked if asked > margin else 1.5 * margin))
            if leaving:
                with runner.changing():
                    slots.release(leaving)
    finally:
        runner.finish()


def _finished(
    poll: Poll,
    p: int,
    seconds: dict[int, float],
    vectors: list[Tensor],
    steps: int | None = None,  # those of the poll, unless the vectors are newer
) -> Finished:
    group = poll.groups[p]
    return Finished(
        group=group,
        vectors=vectors,
        correct=poll.row_correct[slice(*poll.first_rows[p : p + 2])].tolist(),
        steps=int(poll.step[p]) if steps is None else steps,
        seconds=seconds[group.index],
        failed=bool(poll.failed[p]),
    )


def _event(poll: Poll, runner: StepRunner) -> FitEvent:
    rows = torch.tensor(
        [row.index for group in poll.groups for row in group.rows], dtype=torch.int64, device="cpu"
    )
    running = weakref.ref(runner)  # an event that is kept does not keep the device's memory

    def best_of(row: int) -> Tensor | None:
        now = running()
        if now is None:
            return None
        for g, group in enumerate(now.slots.groups):
            rows = [one.index for one in group.rows]
            if row in rows:
                return by_row(now.best_of(g), len(rows))[rows.index(row)]
        return None

    return FitEvent(rows, poll.scored_at, poll.loss, poll.correct, poll.margin, best_of)
