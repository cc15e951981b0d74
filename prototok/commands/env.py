"""`prototok env`."""

from __future__ import annotations


def env() -> None:
    """Print machine, versions, kernels, and what a usual model runs on here."""
    import torch

    from prototok.bench.machine import describe, usual_plan

    for name, value in describe().items():
        print(f"{name}: {value}")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\na Llama of hidden size 768, {usual_plan(dtype)}")
