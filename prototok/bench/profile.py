"""Steps a … b−1 of a fit, or decodings, under a profiler.

On CUDA the steps stand between cudaProfilerStart and cudaProfilerStop, for Nsight Systems and
Nsight Compute (docs/profiling.md has the command lines); elsewhere, and on CUDA where a trace is
asked for, torch.profiler prints a table and writes a trace for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from prototok.common.arguments import hint
from prototok.common.files import whole
from prototok.decoding.decode import decode_vectors, require_length
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import StepRunner, step_runner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.fast_fit import FitEvent
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement
from prototok_kernels.plan import Plan


def step_range(text: str) -> tuple[int, int]:
    """Read "a:b" as (a, b); ValueError where it is not a range, or an empty one."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, end = (int(match[1]), int(match[2])) if match else (0, 0)
    if not first < end:
        raise ValueError(f"profile: {text!r} is not a range a:b of steps with a < b")
    return first, end


def require_work(what: str) -> None:
    """Raise ValueError unless that is something to profile."""
    if what not in ("fit", "decode"):
        raise ValueError(f"what: {what!r} is not 'fit' or 'decode'" + hint(what, ("fit", "decode")))


class Capture:
    """A profiler that is started once and stopped once; `report` says what it saw."""

    def __init__(self, device: torch.device, trace: Path | None) -> None:
        """`trace` None: cudaProfilerStart and Stop on CUDA, torch.profiler's table elsewhere."""
        self.device, self.trace = device, trace
        self.profiler: torch.profiler.profile | None = None
        if device.type != "cuda" or trace is not None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
        self.running = False
        self.seconds = 0.0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.profiler is None:
            torch.cuda.profiler.start()
        else:
            self.profiler.start()
        self.running = True
        self.clock = time.perf_counter()

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self.clock
        self.running = False
        if self.profiler is None:
            torch.cuda.profiler.stop()
        else:
            self.profiler.stop()
            if self.trace is not None:
                self.trace.parent.mkdir(parents=True, exist_ok=True)
                with whole(self.trace) as temporary:
                    self.profiler.export_chrome_trace(str(temporary))

    def report(self, rows: int = 25) -> str:
        """Return the table of the most expensive operations; empty where Nsight has the figures."""
        if not self.seconds:
            return "nothing was profiled: the work ended before its first step"
        if self.profiler is None:
            return ""
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        return str(self.profiler.key_averages().table(sort_by=by, row_limit=rows))


class ProfiledSteps:
    """A callback of `fast_fit` that profiles its steps a … b−1, to the next look at the device."""

    def __init__(self, capture: Capture, steps: tuple[int, int]) -> None:
        self.capture = capture
        self.first, self.end = steps
        self.made = self.last = 0
        self.over = False

    def __call__(self, event: FitEvent) -> None:
        latest = int(event.steps.max()) + 1  # a new bucket begins from zero
        self.made += latest if latest < self.last else latest - self.last
        self.last = latest
        if self.over:
            return
        if not self.capture.running and self.made >= self.first:
            self.capture.start()
        elif self.capture.running and self.made >= self.end:
            self.close()

    def close(self) -> None:
        """Stop, even if the work ended before step b."""
        if self.capture.running:
            self.capture.stop()
            self.over = True


@dataclass(frozen=True)
class Work:
    """What is profiled: random texts, because neither a step nor a decoding depends on the text."""

    what: str = "fit"  # or "decode"
    length: int = 32  # N
    batch: int = 16  # rows
    backend: str = "auto"
    eager: bool = False  # on CUDA, steps without a graph: only those show named ranges

    def plan(self, lm: FrozenLM) -> Plan:
        """Return which kernels it runs on."""
        return lm.plan(self.batch, self.length, self.backend, pair=self.what == "fit")


def profile(
    lm: FrozenLM, work: Work, steps: tuple[int, int] = (20, 30), trace: Path | None = None
) -> tuple[float, str]:
    """Return seconds a step of steps a … b−1, and the table of torch.profiler where it was used.

    Raises:
        ValueError: an unknown kind of work, or a length the model has no room for.
    """
    require_work(work.what)
    arrangement = Arrangement.parse("e m*")
    require_length(work.length, lm, arrangement)
    advance = _fit(lm, work, arrangement) if work.what == "fit" else _decode(lm, work, arrangement)
    first, end = steps
    capture = Capture(lm.device, trace)
    advance(first)
    capture.start()
    advance(end - first)
    capture.stop()
    return capture.seconds / (end - first), capture.report()


def _fit(lm: FrozenLM, work: Work, arrangement: Arrangement) -> Callable[[int], None]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (work.batch, work.length), generator=generator, device="cpu")
    groups = make_groups(list(ids), [0], None, None)
    endless = Recipe(margin=1e9, max_steps=10**9)
    setup = Setup(lm, OneForward(arrangement), endless, work.backend, work.batch)
    slots = Slots(setup, Room(work.batch, work.batch, work.length))
    slots.admit(groups)
    make = StepRunner if work.eager else step_runner
    return make(lm, slots, work.batch).advance


def _decode(lm: FrozenLM, work: Work, arrangement: Arrangement) -> Callable[[int], None]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(
        work.batch,
        arrangement.slots,
        lm.hidden_size,
        generator=generator,
        dtype=torch.float32,
        device="cpu",
    )

    def advance(times: int) -> None:
        for _ in range(times):
            decode_vectors(lm, vectors, arrangement, work.length, None, work.backend)

    return advance
