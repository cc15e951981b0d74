"""Steps in a row, and what they led to: directly on the CPU, by CUDA graphs on a GPU.

Both run the same `step`. On CUDA the host stays ahead of the device: it queues a burst of steps and
looks meanwhile at the flags of the burst before. Letters: R rows, G groups.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from prototok.common.ranges import named_range
from prototok.common.urgent import on_cuda
from prototok.fitting.engine.rows import Group
from prototok.fitting.engine.slots import Slots, Window
from prototok.fitting.engine.step import step
from prototok.model.frozen_lm import FrozenLM

# Steps a window runs before it is captured: kernels are compiled and libraries set up by then.
_WARM_UP = 2
# Seconds between two looks at the flags on CUDA, at most: a row that is done waits one and a half
# of them. And steps, however short: more would spare the host nothing.
_LOOK_SECONDS, _LOOK_STEPS = 0.05, 32


@dataclass(frozen=True)
class Poll:
    """The flags of the groups and the scores of the rows as they were after some step, on the host.

    groups      those in flight, in the order of what follows
    first_rows  the first row of each of them, and one behind the last
    done        (G,) bool, reached the goal; spent (G,) bool, out of updates
    cold        (G,) bool, the next update is a cold one
    failed      (G,) bool, ended by a loss or a gradient that is not finite
    step        (G,) updates made; best_margin (G,) of the vectors kept
    row_correct (R,) right tokens of the vectors kept
    scored_at   (R,) updates made before the last score: loss, correct and margin, all (R,)
    """

    groups: list[Group]
    first_rows: list[int]
    done: Tensor
    spent: Tensor
    cold: Tensor
    failed: Tensor
    step: Tensor
    best_margin: Tensor
    row_correct: Tensor
    scored_at: Tensor
    loss: Tensor
    correct: Tensor
    margin: Tensor
    written: torch.cuda.Event | None = None  # from when on all this is on the host


class StepRunner:
    """Runs steps as they come: what the CPU does, and what CUDA falls back to.

    `rows_per_forward` halves whenever a step runs out of memory, and the step is run again.
    """

    burst = 1  # steps between two looks at the flags; on the CPU a look costs nothing
    lags = False  # True: a poll gives the look before the last, so that nothing waits for it

    def __init__(self, lm: FrozenLM, slots: Slots, rows_per_forward: int) -> None:
        self.lm, self.slots, self.rows_per_forward = lm, slots, rows_per_forward
        self.last: Poll | None = None
        self.reopened: set[int] = set()  # groups of which `last` says what is no longer so

    def advance(self, steps: int) -> None:
        """Make this many steps, or queue them."""
        for _ in range(steps):
            self._step()

    def poll(self) -> Poll | None:
        """Look at what the steps so far led to; where polls lag, those before the last burst."""
        with named_range("poll", self.lm.device):
            look = self._look()
        if not self.lags:
            return look
        poll, reopened = self.last, self.reopened
        self.last, self.reopened = look, set()
        if poll is None:
            return None
        if poll.written is not None:
            poll.written.synchronize()
        for g, group in enumerate(poll.groups):
            if group.index in reopened:
                poll.done[g] = False
        return poll

    def best_of(self, group: int) -> list[Tensor]:
        """Return the best vectors of a group that is done or spent, fp32, on the CPU."""
        return [vectors.cpu().clone() for vectors in self.slots.best_of(group)]

    def mean_of(self, group: int) -> tuple[list[Tensor], int]:
        """Return the means of a cold group, fp32, on the CPU, and the updates made by then."""
        means = [vectors.cpu().clone() for vectors in self.slots.mean_of(group)]
        return means, int(self.slots.step[group])

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Enclose every change of the slots from outside."""
        yield

    def reopen(self, group: int, margin: float) -> None:
        """Let a group that was done go on, now with `margin` to clear."""
        with self.changing():
            self.slots.reopen(group, margin)
        if self.last is not None:
            self.reopened.add(self.slots.groups[group].index)

    def finish(self) -> None:
        """Wait for the device, before the slots are let go."""

    def _step(self) -> None:
        while True:
            try:
                step(self.lm, self.slots, self.rows_per_forward)
                return
            except torch.OutOfMemoryError:
                if not self._can_halve():
                    raise
            self._halve()  # here, where the error no longer holds what the step had allocated

    def _can_halve(self) -> bool:
        return min(self.rows_per_forward, self.slots.window.rows) > 1

    def _halve(self) -> None:
        self.rows_per_forward = min(self.rows_per_forward, self.slots.window.rows) // 2
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()

    def _look(self) -> Poll:
        slots = self.slots
        groups, rows = len(slots.groups), slots.rows

        def copied(tensor: Tensor, count: int) -> Tensor:
            # To pinned memory, so that the copy from CUDA waits for nothing.
            part = tensor[:count]
            return part.to("cpu", non_blocking=True) if part.is_cuda else part.clone()

        return Poll(
            groups=slots.groups,
            first_rows=slots.first_rows,
            done=copied(slots.done, groups),
            spent=copied(slots.spent(), groups),
            cold=copied(slots.is_cold(slice(groups)), groups),
            failed=copied(slots.failed, groups),
            step=copied(slots.step, groups),
            best_margin=copied(slots.best_margin, groups),
            row_correct=copied(slots.row_correct, rows),
            scored_at=copied(slots.scored_at, rows),
            loss=copied(slots.loss, rows),
            correct=copied(slots.correct, rows),
            margin=copied(slots.margin, rows),
            written=torch.cuda.current_stream().record_event() if slots.loss.is_cuda else None,
        )


class CapturedStep(StepRunner):
    """Replays one CUDA graph for each window, captured after two steps that ran without.

    All of it happens on a stream of its own, where capturing is allowed and where a poll can lag
    one burst behind: `poll` gives the flags of the burst before the last, so that the device has
    work while the host looks. A group that is done or spent no longer changes, so its vectors can
    be read meanwhile; `changing` waits for such reads.

    How many steps a burst has is decided once, by what the first burst took that was steady: of
    replays alone, or of steps that will never be captured.
    """

    burst = 4  # until then
    lags = True

    def __init__(self, lm: FrozenLM, slots: Slots, rows_per_forward: int) -> None:
        super().__init__(lm, slots, rows_per_forward)
        # Tables that grow with the input are let go when they do; the graphs go on reading these.
        self.tables = getattr(lm.body, "tables", lambda n: None)(
            slots.inputs.input_length(slots.room.length)
        )
        self.stream = torch.cuda.Stream(lm.device)
        self.stream.wait_stream(torch.cuda.current_stream(lm.device))
        self.changed = self.stream.record_event()  # the last change of the slots from outside
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[Window, int], torch.cuda.CUDAGraph] = {}
        self.ran: Counter[tuple[Window, int]] = Counter()  # without a graph
        self.capturing = True
        self.steady = self.decided = False
        self.timed: tuple[torch.cuda.Event, torch.cuda.Event, int] | None = None

    def advance(self, steps: int) -> None:
        with torch.cuda.stream(self.stream):
            if self.decided:
                super().advance(steps)
                return
            self.steady, begin = True, self._now()
            super().advance(steps)
            if self.timed is not None:
                self._decide(*self.timed)  # that burst is through, or nearly; this one is queued
            elif self.steady:
                self.timed = begin, self._now(), steps

    def _now(self) -> torch.cuda.Event:
        return self.stream.record_event(torch.cuda.Event(enable_timing=True))

    def _decide(self, begin: torch.cuda.Event, end: torch.cuda.Event, steps: int) -> None:
        end.synchronize()
        self.burst = burst_for(begin.elapsed_time(end) / 1e3 / steps)
        self.timed, self.decided = None, True

    def best_of(self, group: int) -> list[Tensor]:
        torch.cuda.current_stream(self.lm.device).wait_event(self.changed)
        return super().best_of(group)

    def mean_of(self, group: int) -> tuple[list[Tensor], int]:
        with torch.cuda.stream(self.stream):  # a mean changes with each step: after the last queued
            return super().mean_of(group)

    @contextmanager
    def changing(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.lm.device))
        with torch.cuda.stream(self.stream):
            yield
        self.changed = self.stream.record_event()

    def finish(self) -> None:
        self.stream.synchronize()

    def _look(self) -> Poll:
        with torch.cuda.stream(self.stream):
            return super()._look()

    def _step(self) -> None:
        key = self.slots.window, self.rows_per_forward
        if key not in self.graphs and self.capturing:
            self.steady = False
            if self.ran[key] >= _WARM_UP:
                self._capture(key)
        if key in self.graphs:
            self.graphs[key].replay()
        else:
            self.ran[key] += 1
            if self.capturing and self.ran[key] == _WARM_UP and self.lm.body.family == "general":
                self._step_without_waiting()
            else:
                super()._step()

    def _step_without_waiting(self) -> None:
        """Make a step in which nothing may wait for the device, or give up to capture it.

        The own forwards do not wait. In a capture a wait is an error after which torch 2.11 takes
        the allocator to be capturing still, so that what runs on without a graph fails as well.
        """
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            super()._step()
            return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(error)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        super()._step()  # nothing that it reads was written

    def _give_up(self, error: RuntimeError) -> None:
        self.capturing = False
        why = str(error).strip().split("\n")[0]
        warnings.warn(f"the step runs without a CUDA graph, slower ({why})", stacklevel=3)

    def _capture(self, key: tuple[Window, int]) -> None:
        """Record the step that comes next, of which nothing runs yet.

        Where there is no room for a graph, half the rows at a time are tried next. A model that
        cannot be captured at all goes on without, which is slower and nothing else.
        """
        torch.cuda.empty_cache()  # what the steps without a graph used is the graph's now
        graph, failure = torch.cuda.CUDAGraph(), cast("RuntimeError | None", None)
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                step(self.lm, self.slots, self.rows_per_forward)
        except RuntimeError as error:
            failure = error
        if failure is None:
            self.graphs[key] = graph
            return
        del graph
        failure = failure.with_traceback(None)  # it holds what the step had allocated
        torch.cuda.synchronize(self.lm.device)
        if _is_out_of_memory(failure) and self._can_halve():
            self._halve()
        else:
            self._give_up(failure)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if this error, or one it came with, is for want of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _runner(device: torch.device) -> type[StepRunner]:
    return CapturedStep if on_cuda(device) else StepRunner


def step_runner(lm: FrozenLM, slots: Slots, rows_per_forward: int) -> StepRunner:
    """Return what runs steps fastest where the model is."""
    return _runner(lm.device)(lm, slots, rows_per_forward)


def burst_for(seconds: float) -> int:
    """Return the steps between two looks at the flags on CUDA, where one takes so many seconds.

    A power of two, so that a clock that runs a little differently decides alike.
    """
    most = min(_LOOK_SECONDS / max(seconds, 1e-6), float(_LOOK_STEPS))
    return 1 << max(0, int(math.log2(most)) if most >= 1 else 0)
