"""The head's loss and gradient: torch eager, torch's own chunked op, and ours for each backend.

    pytest benchmarks/kernels --benchmark-group-by=group --benchmark-sort=mean

Every variant is compared with eager before it is timed. Letters: R rows, d hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.backend import unavailable
from prototok_kernels.linear_cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # (R, d, V)
    "small-vocabulary": (1024, 256, 4096),
    "pythia-160m": (1024, 768, 50304),
}
if DEVICE == "cuda":
    SHAPES["llama-3.2-1b"] = (8192, 2048, 128256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a training loop writes: fp32 cross-entropy of the logits, autograd, and the argmax."""
    hidden = hidden.detach().requires_grad_()
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    (grad,) = torch.autograd.grad(loss, hidden)
    logits.detach().argmax(dim=-1)
    return loss.detach(), grad


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`F.linear_cross_entropy` with 256 rows a chunk; its default on a CPU is 8, ten times slower.

    It has no argmax and no margin.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    hidden = hidden.detach().requires_grad_()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    loss = F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad


def ours(backend: str) -> Head:
    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        missing = unavailable(backend, DEVICE)
        if missing:
            pytest.skip(missing)
        out = linear_cross_entropy(hidden, weight, targets, backend=backend)
        assert out.grad_hidden is not None
        return out.loss.sum(), out.grad_hidden

    return head


def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrix products and nothing else: the ceiling."""
    logits = hidden @ weight.T
    return logits, logits @ weight


VARIANTS: dict[str, Head] = {
    "eager": eager,
    "torch-chunked": torch_chunked,
    "ours-torch": ours("torch"),
    "ours-cpu": ours("cpu"),
    "ours-triton": ours("triton"),
    "products-only": products,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(benchmark, shape, dtype, variant):
    rows, d, vocabulary = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, d, generator=generator).to(DEVICE, DTYPES[dtype])
    weight = torch.randn(vocabulary, d, generator=generator) / d**0.5
    weight = weight.to(DEVICE, DTYPES[dtype])
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(DEVICE)
    head = VARIANTS[variant]
    if variant != "products-only":
        loss, grad = head(hidden, weight, targets)
        wanted_loss, wanted_grad = eager(hidden, weight, targets)
        tolerance = {"bf16": 0.02, "fp32": 1e-5}[dtype]
        assert (grad - wanted_grad).float().norm() <= tolerance * wanted_grad.float().norm()
        assert (loss - wanted_loss).abs() <= tolerance * wanted_loss.abs()

    def run() -> None:
        head(hidden, weight, targets)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"linear_cross_entropy {shape} {dtype} {DEVICE}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
