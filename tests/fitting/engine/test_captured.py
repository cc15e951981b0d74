"""`CapturedStep` itself, on the CPU: stand-ins for torch.cuda's streams, events and graphs.

A stand-in graph replays the step it was captured with, and refuses another window. What this cannot
show is a real capture; what it does show is everything around one.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fake_cuda
import prototok
from fake_cuda import CurrentStream
from prototok import FitResult, FrozenLM, Recipe
from prototok.fitting.engine import runner as module
from prototok.fitting.engine.runner import CapturedStep, StepRunner
from prototok.fitting.engine.slots import Slots, Window, _halved

RECIPE = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=100)
real_step = module.step


class Patient(StepRunner):
    """Steps without a graph that look as seldom and as late as captured ones of 5 ms."""

    burst, lags = CapturedStep.burst, CapturedStep.lags
    advances = 0

    def advance(self, steps: int) -> None:
        super().advance(steps)
        self.advances += 1
        # One with a capture, one that is timed, one while that is read.
        self.burst = CapturedStep.burst if self.advances < 3 else module.burst_for(5e-3)


class Event:
    """Of a device on which a step takes five milliseconds."""

    clock = 0
    at = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.waited = enable_timing, False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: Event) -> float:
        assert self.timing and end.timing and end.waited
        return 5.0 * (end.at - self.at)


class Stream(fake_cuda.Stream):
    wait_event = fake_cuda.Stream.wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.at = Event.clock
        return event

    def synchronize(self) -> None:
        self.waited.append("host")


@dataclass
class FakeCuda(CurrentStream):
    """Rows a step has `room` for, what a capture `refuses` with, and whether a step `waits`."""

    room: int | None = None
    refuses: str | None = None
    waits: bool = False
    current: list[Stream] = field(default_factory=lambda: [Stream()])
    graphs: list[Graph] = field(default_factory=list)
    capturing: Graph | None = None
    debug: str = "default"

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Any:
        assert self.current[-1] is stream and capture_error_mode == "thread_local"
        self.capturing, graph.stream, graph.fake = graph, stream, self
        try:
            yield
        finally:
            self.capturing = None
        self.graphs.append(graph)

    def step(self, lm: FrozenLM, slots: Slots, rows: int) -> None:
        if self.room is not None and min(rows, slots.window.rows) > self.room:
            raise torch.OutOfMemoryError("no room")
        if self.waits and (self.capturing or self.debug == "error"):
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing is None:
            Event.clock += 1
            real_step(lm, slots, rows)
            return
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.capturing.what = (lm, slots, rows, slots.window)


class Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        lm, slots, rows, window = self.what
        assert self.fake.current[-1] is self.stream and slots.window == window
        Event.clock += 1
        real_step(lm, slots, rows)
        self.replays += 1


def fitted(
    monkeypatch: pytest.MonkeyPatch, lm: FrozenLM, kind: type[StepRunner], fake: FakeCuda,
    share: str | None,
) -> FitResult:  # fmt: skip
    def window(slots: Slots) -> Window:  # as on CUDA
        room = slots.room
        return Window(
            _halved(room.rows, slots.rows), _halved(room.groups, len(slots.groups)), room.length
        )

    ids = torch.randint(lm.vocab_size, (6, 2), generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patched:
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": fake.graph,
            "stream": fake.stream,
            "current_stream": lambda device=None: fake.current[-1], "empty_cache": lambda: None,
            "graph_pool_handle": lambda: (0, 1), "synchronize": lambda device=None: None,
            "get_sync_debug_mode": lambda: fake.debug,
            "set_sync_debug_mode": lambda mode: setattr(fake, "debug", mode),
        }.items():  # fmt: skip
            patched.setattr(torch.cuda, name, value)
        patched.setattr(Slots, "window", property(window))
        patched.setattr(module, "step", fake.step)
        patched.setattr(module, "_runner", lambda device: kind)
        return prototok.fast_fit(
            lm, ids, share=share, group_size=2 if share else None, recipe=RECIPE, batch_size=4,
            progress=False,
        )  # fmt: skip


def assert_same(found: FitResult, wanted: FitResult) -> None:
    assert torch.equal(found.tokens.e, wanted.tokens.e)
    assert torch.equal(found.tokens.m, wanted.tokens.m)
    for name in ("steps", "loss", "margin", "exact"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("room", [None, 2, 1], ids=["room enough", "room for 2", "room for 1"])
@pytest.mark.parametrize("share", [None, "m", "e"])
def test_is_the_same_as_steps_without_graphs(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM, share: str | None, room: int | None
) -> None:
    fake = FakeCuda(room=room)
    found = fitted(monkeypatch, small_lm, CapturedStep, fake, share)
    assert sum(graph.replays for graph in fake.graphs) > 20
    assert len(fake.current) == 1  # every stream was left
    assert_same(found, fitted(monkeypatch, small_lm, Patient, FakeCuda(room=room), share))


@dataclass
class TightCapture(FakeCuda):
    """The steps have room, and a graph has it for two rows."""

    def step(self, lm: FrozenLM, slots: Slots, rows: int) -> None:
        if self.capturing is not None and min(rows, slots.window.rows) > 2:
            raise RuntimeError("capture failed") from torch.OutOfMemoryError("no room")
        super().step(lm, slots, rows)


@pytest.mark.parametrize("share", [None, "m", "e"])
def test_out_of_memory_in_the_capture_alone(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM, share: str | None
) -> None:
    fake = TightCapture()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fitted(monkeypatch, small_lm, CapturedStep, fake, share)
    assert fake.graphs and all(graph.what[2] <= 2 for graph in fake.graphs)
    plain = fitted(monkeypatch, small_lm, Patient, FakeCuda(), share)
    # Other rows a forward round otherwise; nobody is lost for that.
    assert abs(int(found.exact.sum()) - int(plain.exact.sum())) <= 2
    assert found.steps.min() > 0


def test_a_capture_that_fails_otherwise_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM
) -> None:
    fake = FakeCuda(refuses="operation not permitted when stream is capturing\nand so on")
    with pytest.warns(UserWarning, match=r"without a CUDA graph, slower \(operation not permitted"):
        found = fitted(monkeypatch, small_lm, CapturedStep, fake, None)
    assert not fake.graphs
    assert_same(found, fitted(monkeypatch, small_lm, Patient, FakeCuda(), None))


def test_a_model_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of transformers may read values back; that is found out before a capture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    lm = prototok.load(GPT2LMHeadModel(config).eval(), device="cpu", dtype="float32")
    captures: list[object] = []
    monkeypatch.setattr(CapturedStep, "_capture", lambda runner, key: captures.append(key))
    fake = FakeCuda(waits=True)
    with pytest.warns(UserWarning, match="slower .called a synchronizing CUDA operation"):
        found = fitted(monkeypatch, lm, CapturedStep, fake, None)
    assert not captures and fake.debug == "default"
    assert_same(found, fitted(monkeypatch, lm, Patient, FakeCuda(), None))


def test_the_time_of_a_step_decides_how_long_a_burst_is() -> None:
    """At most 50 ms and 32 steps, and a power of two; a step that takes longer is looked at."""
    found = {ms: module.burst_for(1e-3 * ms) for ms in (0.0, 0.1, 1, 1.7, 5, 12, 34, 50.1, 138)}
    assert found == {0.0: 32, 0.1: 32, 1: 32, 1.7: 16, 5: 8, 12: 4, 34: 1, 50.1: 1, 138: 1}


def test_a_burst_is_timed_once_and_without_captures(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM
) -> None:
    """Decided by replays alone: warming up and capturing take longer than a step."""
    decided: list[tuple[int, int]] = []
    decide = CapturedStep._decide

    def seen(runner: CapturedStep, begin: Event, end: Event, steps: int) -> None:
        replays = sum(graph.replays for graph in fake.graphs)
        decide(runner, begin, end, steps)
        decided.append((replays, runner.burst))

    monkeypatch.setattr(CapturedStep, "_decide", seen)
    fake = FakeCuda()
    fitted(monkeypatch, small_lm, CapturedStep, fake, None)
    first = CapturedStep.burst
    assert decided == [(3 * first - 2, 8)]  # two steps warmed up
