"""Named ranges of work, as a profiler shows them: NVTX on CUDA, torch's own elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import _profiler_enabled, profiler  # type: ignore[attr-defined]


def named_range(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Show a block of work as `name` in Nsight Systems on CUDA, in torch.profiler elsewhere.

    A CUDA graph is replayed without any; Nsight then shows the graph's kernels (docs/profiling.md).
    """
    if device.type == "cuda":
        return torch.cuda.nvtx.range(name)
    # Without a profiler a range would still cost a small model's forward several percent.
    profiled = _profiler_enabled() or profiler._is_profiler_enabled  # of this thread, or of all
    return torch.profiler.record_function(name) if profiled else nullcontext()
