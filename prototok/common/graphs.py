"""CUDA graphs: what was queued once, queued again as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(
    queue: Callable[[], object], device: torch.device, beside: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    """Return a graph of what `queue()` queues on the current stream; none of it runs yet.

    The current stream must not be the default one. The graph's kernels have the priority of that
    stream. Whatever sets itself up at its first use must have run before. Replays read and write
    the memory that was read and written here, so its owner must live as long.

    Args:
        queue: must not wait for the device.
        device: a CUDA device.
        beside: a graph that is never replayed at the same time, and whose results are never read
            after a replay of this one: both then use the same memory.

    Raises RuntimeError where the capture fails, torch.OutOfMemoryError among them.
    """
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, pool=None if beside is None else beside.pool(),
        stream=torch.cuda.current_stream(device), capture_error_mode="thread_local",
    ):  # fmt: skip
        queue()
    found: torch.cuda.CUDAGraph = graph
    return found
