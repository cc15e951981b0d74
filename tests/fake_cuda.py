"""Stand-ins for torch.cuda's streams, events and graphs, on the CPU.

A graph notes torch's operations while it is captured and undoes what they wrote. A replay runs them
again on the same tensors, into the same memory: whatever was not in that memory, or was decided in
Python, is not seen, and neither is what runs outside of torch: the backend must be "torch". What
this cannot show is a real capture, or that two streams race.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prototok.autoregressive import static_kv
from prototok.common import urgent
from prototok.decoding import replay
from prototok.fitting.engine import buckets, runner
from prototok.fitting.engine.slots import Slots
from prototok.model.families import general

# What makes the host wait for a number on a GPU.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
_DEBUG = {"default": 0, "warn": 1, "error": 2}


class Event:
    """Of a device on which a step takes five milliseconds."""

    clock = 0  # steps
    at = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.waited = enable_timing, False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: Event) -> float:
        assert self.timing and end.timing and end.waited
        return 5.0 * (end.at - self.at)


class Stream:
    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority = priority
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)

    wait_event = wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.at = Event.clock
        return event

    def synchronize(self) -> None:
        self.waited.append("host")


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in _WAITS or (
            # An index of bool is counted first.
            name.startswith("index")
            and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1:]))
        )
        if waits:
            raise RuntimeError(f"{name} waits for the device")
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


class Noting(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # a named range
            return func(*args, **kwargs)
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                self.before.append((written, written.clone()))
        out = func(*args, **kwargs)
        self.graph.noted.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        for written, before in reversed(self.before):
            written.copy_(before)


class Graph:
    def __init__(self) -> None:
        self.noted: list[tuple[Any, Any, Any, Any]] = []
        self.stream: Stream | None = None
        self.memory: object = None
        self.replays = 0

    def pool(self) -> object:
        return self.memory

    @torch.no_grad()
    def replay(self) -> None:
        assert torch.cuda.current_stream() is self.stream
        for func, args, kwargs, out in self.noted:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.replays += 1
        Event.clock += 1


@dataclass
class FakeCuda:
    """What was captured; `refuses`: what the next captures fail with."""

    graphs: list[Graph] = field(default_factory=list)
    current: list[Stream] = field(default_factory=lambda: [Stream()])
    refuses: RuntimeError | None = None
    capturing: Graph | None = None
    debug: int = 0
    refusing: NoWaiting | None = None

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    @contextlib.contextmanager
    def graph(
        self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        assert self.current[-1] is stream and capture_error_mode == "thread_local"
        if self.refuses is not None:
            raise type(self.refuses)(*self.refuses.args)  # which holds frames, and is let go
        graph.stream, graph.memory = stream, object() if pool is None else pool
        noting = Noting(graph)
        self.capturing = graph
        try:
            with noting, NoWaiting():
                yield
        finally:
            self.capturing = None
            noting.undo()
        self.graphs.append(graph)

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.debug = _DEBUG[mode] if isinstance(mode, str) else mode
        if self.refusing is not None:
            self.refusing.__exit__(None, None, None)
        self.refusing = NoWaiting() if self.debug == _DEBUG["error"] else None
        if self.refusing is not None:
            self.refusing.__enter__()

    def of_torch(self) -> dict[str, Any]:
        """What stands for the names of torch.cuda."""
        room = 1 << 34
        return {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": self.graph,
            "stream": self.stream, "current_stream": lambda device=None: self.current[-1],
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "graph_pool_handle": lambda: (0, 1), "synchronize": lambda device=None: None,
            "get_sync_debug_mode": lambda: self.debug,
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "empty_cache": lambda: None, "mem_get_info": lambda device: (room, room),
            "memory_allocated": lambda device: 0, "max_memory_allocated": lambda device: 1 << 20,
            "reset_peak_memory_stats": lambda device: None,
        }  # fmt: skip


def windows_of_cuda(patch: pytest.MonkeyPatch) -> None:
    """Let steps compute the windows that they compute on CUDA, free places among them."""
    window: Any = Slots.window

    def as_on_cuda(slots: Slots) -> Any:
        of_cuda = SimpleNamespace(
            device=torch.device("cuda"), room=slots.room, rows=slots.rows, groups=slots.groups
        )
        return window.fget(of_cuda)

    patch.setattr(Slots, "window", property(as_on_cuda))


def stand_in(patch: pytest.MonkeyPatch, fake: FakeCuda, *modules: Any) -> None:
    """Let the CPU stand for CUDA in these modules."""
    for name, value in fake.of_torch().items():
        patch.setattr(torch.cuda, name, value)
    for module in modules:
        patch.setattr(module, "on_cuda", lambda device: True)


DECODING = (urgent, static_kv, replay)
FITTING = (runner, buckets, general)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Let the CPU stand for CUDA, for what is decoded."""
    fake = FakeCuda()
    stand_in(monkeypatch, fake, *DECODING)
    urgent._of_thread.streams.clear()
    yield fake
    urgent._of_thread.streams.clear()
