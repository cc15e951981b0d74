"""One AdamW update of every slot: `torch.optim.AdamW` and ours for each backend.

    pytest benchmarks/kernels --benchmark-group-by=group --benchmark-sort=mean

Every variant is compared with `torch.optim.AdamW` before it is timed. Letters: R rows,
D coordinates a row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prototok_kernels.adamw_rows import AdamWSettings, AdamWState, adamw_rows_
from prototok_kernels.backend import unavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"16x256": (16, 256), "256x768": (256, 768), "1024x2048": (1024, 2048)}
SETTINGS = AdamWSettings(betas=(0.9, 0.999), weight_decay=0.1)
LR = 0.01
GATE_STEPS = 3


def torch_optim(param: Tensor, grad: Tensor, foreach: bool) -> Callable[[], None]:
    """One clock and one learning rate for all rows: less than what ours does."""
    param.grad = grad
    optimizer = torch.optim.AdamW(
        [param],
        lr=LR,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        foreach=foreach,
        fused=not foreach,
    )
    return optimizer.step


def ours(param: Tensor, grad: Tensor, backend: str) -> Callable[[], None]:
    missing = unavailable(backend, DEVICE)
    if missing:
        pytest.skip(missing)
    state = AdamWState.zeros(param)
    lr = torch.full((param.shape[0],), LR, device=DEVICE)
    active = torch.ones(param.shape[0], dtype=torch.bool, device=DEVICE)
    return lambda: adamw_rows_(param, grad, state, lr, active, SETTINGS, backend=backend)


VARIANTS: dict[str, Callable[[Tensor, Tensor], Callable[[], None]]] = {
    "torch-optim-foreach": lambda param, grad: torch_optim(param, grad, foreach=True),
    "torch-optim-fused": lambda param, grad: torch_optim(param, grad, foreach=False),
    "ours-torch": lambda param, grad: ours(param, grad, "torch"),
    "ours-cpu": lambda param, grad: ours(param, grad, "cpu"),
    "ours-triton": lambda param, grad: ours(param, grad, "triton"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_update(benchmark, shape, variant):
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(SHAPES[shape], generator=generator).to(DEVICE) for _ in range(2))
    results = []
    for make in (VARIANTS["torch-optim-foreach"], VARIANTS[variant]):
        param = start.clone()
        update = make(param, grad)
        for _ in range(GATE_STEPS):
            update()
        results.append(param.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)

    def run() -> None:
        update()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"adamw_rows {shape} {DEVICE}"
    benchmark.pedantic(run, rounds=50, warmup_rounds=5)
