"""Time calls on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(function: Callable[[], object], device: torch.device, least: float = 0.2) -> list[float]:
    """Time single calls, in seconds, for at least `least` seconds and three times, warm."""
    function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < least and len(times) < 200):
        times.append(once(function, device))
    return times


def once(function: Callable[[], object], device: torch.device) -> float:
    """Time one call, in seconds, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock
