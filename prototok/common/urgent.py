"""Work that is waited for while a queue of steps runs beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Streams(threading.local):
    """A thread's own, so that nothing of another is captured with what it captures."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}


_of_thread = _Streams()


def on_cuda(device: torch.device) -> bool:
    """Return True if work on this device is queued on streams, and can be captured."""
    return device.type == "cuda"


def _stream(device: torch.device) -> torch.cuda.Stream:
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.streams
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)
    return streams[device]


@contextmanager
def urgent(device: torch.device) -> Iterator[None]:
    """Put what is queued on CUDA inside in front of what other streams have queued.

    It begins when the current stream is through, and the host must have read its results before
    the block ends: nothing else waits for them. Within another such block it does nothing.
    """
    if not on_cuda(device):
        yield
        return
    stream, current = _stream(device), torch.cuda.current_stream(device)
    if stream == current:
        yield
        return
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
