"""Work that is waited for while a queue of steps runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def urgent(device: torch.device) -> Iterator[None]:
    """Put what is queued on CUDA inside in front of what other streams have queued.

    It begins when the current stream is through, and the host must have read its results before
    the block ends: nothing else waits for them.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
