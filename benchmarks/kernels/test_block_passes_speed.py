"""The passes between a block's products, forward and backward: plain torch, and ours.

    pytest benchmarks/kernels --benchmark-group-by=group --benchmark-sort=mean

Every variant is compared with plain torch in fp64 before it is timed. Letters: B rows, N positions,
d hidden size, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prototok_kernels.activation import activation
from prototok_kernels.attention import attention
from prototok_kernels.backend import unavailable
from prototok_kernels.residual_norm import residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # B, N, d, I, heads, key-value heads
    "stories3m": (16, 64, 192, 512, 6, 2),
    "pythia-160m": (8, 128, 768, 3072, 12, 12),
}
if DEVICE == "cuda":
    SHAPES["llama-3.2-1b"] = (64, 256, 2048, 8192, 32, 8)
Op = Callable[[Tensor, str], Tensor]


def norm(shape: str) -> tuple[Tensor, Op]:
    rows, length, width, *_ = SHAPES[shape]
    weight = torch.linspace(0.5, 1.5, width, device=DEVICE)

    def run(x: Tensor, backend: str) -> Tensor:
        total, normed = residual_norm(x, x, weight.to(x.dtype), None, 1e-5, backend)
        return total + normed

    return torch.randn(rows, length, width, device=DEVICE), run


def gate(shape: str) -> tuple[Tensor, Op]:
    rows, length, _, inner, *_ = SHAPES[shape]

    def run(z: Tensor, backend: str) -> Tensor:
        return activation(z, None, "silu", True, backend)

    return torch.randn(rows, length, 2 * inner, device=DEVICE), run


def attend(shape: str) -> tuple[Tensor, Op]:
    rows, length, width, _, heads, kv_heads = SHAPES[shape]
    size = width // heads
    frequencies = 10000.0 ** (-torch.arange(size // 2, device=DEVICE).float() * 2 / size)
    positions = torch.arange(length, device=DEVICE).float()
    angle = torch.outer(positions, frequencies).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()

    def run(qkv: Tensor, backend: str) -> Tensor:
        return attention(
            qkv * 1, cos, sin, heads=heads, kv_heads=kv_heads, scaling=size**-0.5, backend=backend
        )  # * 1: in place on CUDA

    return torch.randn(rows, length, (heads + 2 * kv_heads) * size, device=DEVICE), run


OPS = {"residual_norm": norm, "activation": gate, "attention": attend}


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward(benchmark, op, shape, dtype, backend):
    missing = unavailable(backend, DEVICE)
    if missing or (backend == "triton" and DEVICE == "cpu"):
        pytest.skip(missing or "the interpreter is not timed")
    torch.manual_seed(0)
    x, run = OPS[op](shape)
    x = x.to(dtype).requires_grad_()
    grad = torch.randn_like(run(x, backend))

    def once(x: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        out = run(x, backend)
        (found,) = torch.autograd.grad(out, x, grad)
        return out, found

    wanted = once(x.detach().double().requires_grad_(), grad.double(), "torch")
    for found, exact in zip(once(x, grad, backend), wanted, strict=True):
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        assert (found.double() - exact).norm() <= tolerance * exact.norm()

    def timed() -> None:
        once(x, grad, backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {shape} {dtype} {DEVICE}"
    benchmark.pedantic(timed, rounds=9, iterations=3, warmup_rounds=2)
