"""How much memory this process holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resident() -> int:
    """Return bytes of main memory that this process holds; its most so far where /proc is not."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def held(device: torch.device) -> int:
    """Return bytes that this process holds where it computes: on a GPU what torch has reserved."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_reserved(device)
    return resident()
