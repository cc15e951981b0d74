"""Stand-ins for torch.cuda's streams and graphs, on the CPU.

A graph notes torch's operations while it is captured and undoes what they wrote. A replay runs them
again on the same tensors, into the same memory: whatever was not in that memory, or was decided in
Python, is not seen. What this cannot show is a real capture, or that two streams race.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prototok.autoregressive import static_kv
from prototok.common import urgent
from prototok.decoding import replay


class Stream:
    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.priority = priority
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


class Noting(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                self.before.append((written, written.clone()))
        out = func(*args, **kwargs)
        self.graph.noted.append((func, args, kwargs, out))
        return out


class Graph:
    def __init__(self) -> None:
        self.noted: list[tuple[Any, Any, Any, Any]] = []
        self.stream: Stream | None = None
        self.memory: object = None
        self.replays = 0

    def pool(self) -> object:
        return self.memory

    def replay(self) -> None:
        assert torch.cuda.current_stream() is self.stream
        for func, args, kwargs, out in self.noted:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.replays += 1


class CurrentStream:
    """Which stream is current: the last of `current`."""

    current: list[Any]

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()


@dataclass
class FakeCuda(CurrentStream):
    """What was captured; `refuses`: what the next captures fail with."""

    graphs: list[Graph] = field(default_factory=list)
    current: list[Stream] = field(default_factory=lambda: [Stream()])
    refuses: RuntimeError | None = None

    @contextlib.contextmanager
    def graph(
        self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        assert self.current[-1] is stream and capture_error_mode == "thread_local"
        if self.refuses is not None:
            raise type(self.refuses)(*self.refuses.args)  # which holds frames, and is let go
        graph.stream, graph.memory = stream, object() if pool is None else pool
        with Noting(graph) as noting:
            yield
        for written, before in reversed(noting.before):
            written.copy_(before)
        self.graphs.append(graph)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Let the CPU stand for CUDA, for what is decoded."""
    fake = FakeCuda()
    for name, value in {
        "Stream": Stream, "CUDAGraph": Graph, "graph": fake.graph, "stream": fake.stream,
        "current_stream": lambda device=None: fake.current[-1],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (urgent, static_kv, replay):
        monkeypatch.setattr(module, "on_cuda", lambda device: True)
    urgent._of_thread.streams.clear()
    yield fake
    urgent._of_thread.streams.clear()
