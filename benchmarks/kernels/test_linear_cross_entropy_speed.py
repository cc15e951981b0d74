"""The head's loss and gradient: torch eager, torch's own chunked op, libraries, and ours.

    pytest benchmarks/kernels --benchmark-group-by=group --benchmark-sort=mean

Every variant is compared with eager before it is timed; its peak memory is in the JSON as
`peak_bytes`. Liger and cut-cross-entropy run on CUDA where they are installed. Letters: R rows,
d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.backend import this_machine, unavailable
from prototok_kernels.linear_cross_entropy import linear_cross_entropy
from prototok_kernels.packed import why_unpacked

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


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's fused linear cross-entropy (Hsu et al., arXiv 2410.10989); no argmax, no margin."""
    library = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    on_cuda_only()
    hidden = hidden.detach().requires_grad_()
    loss = library.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad


def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cut cross-entropy (Wijmans et al., arXiv 2411.09009); no argmax, no margin."""
    library = pytest.importorskip("cut_cross_entropy")
    on_cuda_only()
    if hidden.dtype == torch.float32:
        pytest.skip("cut-cross-entropy takes 16-bit tensors")
    hidden = hidden.detach().requires_grad_()
    loss = library.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    (grad,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), grad


def on_cuda_only() -> None:
    if DEVICE != "cuda":
        pytest.skip("written for CUDA")


def ours(backend: str) -> Head:
    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        missing = unavailable(backend, DEVICE)
        if missing:
            pytest.skip(missing)
        # As a plan would: the C++ takes a packed weight where it can.
        fits = this_machine().packed is not None and why_unpacked([weight]) is None
        taken = "packed" if backend == "cpu" and fits else backend
        out = linear_cross_entropy(hidden, weight, targets, backend=taken)
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
    "liger": liger,
    "cut-cross-entropy": cut,
    "ours-torch": ours("torch"),
    "ours-cpu": ours("cpu"),
    "ours-triton": ours("triton"),
    "products-only": products,
}


def inputs(shape: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, d, vocabulary = SHAPES[shape]
    here = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    hidden = torch.randn(rows, d, **here).to(DTYPES[dtype])
    weight = torch.randn(vocabulary, d, **here) / d**0.5
    targets = torch.randint(vocabulary, (rows,), **here)
    return hidden, weight.to(DTYPES[dtype]), targets


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory that one more run has beyond what is there before it.

    On the CPU by the kernel's high-water mark of resident memory: blocks below glibc's limit for
    mmap (32 MiB at most) may be hidden in a heap that has grown before.
    """
    run()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(benchmark, shape, dtype, variant):
    hidden, weight, targets = inputs(shape, dtype)
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
    benchmark.extra_info["peak_bytes"] = peak_bytes(run)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_eighth_of_eagers_memory(dtype):
    tensors = inputs("pythia-160m", dtype)
    best = "triton" if DEVICE == "cuda" else "cpu"
    mine, theirs = (peak_bytes(lambda head=head: head(*tensors)) for head in (ours(best), eager))
    print(f"\n{dtype}: {mine / 2**20:.0f} MiB, eager {theirs / 2**20:.0f} MiB")
    assert mine <= theirs / 8
