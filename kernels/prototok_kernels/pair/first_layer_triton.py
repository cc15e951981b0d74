"""Triton kernels of the collapsed first layer: scan, affine combination, and their gradient.

Beside first_layer.py, not in it, so that a machine without triton never imports this file.

Loops whose bound is known at launch only are `while` loops: the interpreter of triton 3.6 cannot
make a `range` of a kernel argument under numpy ≥ 2.4.

Letters: B rows, N positions, d hidden size, H heads, S = H + 2 spanning vectors per row (base of
m, base of e, one U per head); HP heads padded for the tensor cores, BN and BD tiles of N and d.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Stands for log 0: finite, so that differences of two of them are no NaN.
_LOG_ZERO = tl.constexpr(-1.0e30)


@triton.jit
def _log_add_exp(x, y):
    return tl.maximum(x, y) + tl.log(1.0 + tl.exp(-tl.abs(x - y)))


@triton.jit
def _recurrence(decay_x, value_x, decay_y, value_y):
    """Compose two steps T ← value + decay · T: first x, then y."""
    return decay_x * decay_y, value_y + decay_y * value_x


@triton.jit
def affine_scan_forward_kernel(
    a_ptr,  # (B, H, N) fp32
    b_ptr,  # (B, H, N) fp32
    span_ptr,  # (B, S, d)
    x_ptr,  # (B, N, d), out
    coef_ptr,  # (B, S, N), out
    w_ptr,  # (B, H, N) fp32, out; 0 at position 0
    prefix_ptr,  # (B, H, N) fp32, out; at i the log-sum-exp of a over distances below i
    H,
    N,
    D: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per row and block of positions; x is written once and nothing is read twice
    from memory but the few logits of earlier blocks."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    head = tl.arange(0, HP)
    tile = tl.arange(0, BN)
    logits = row * H * N + head[:, None] * N
    top = tl.full([HP], _LOG_ZERO, tl.float32)
    total = tl.zeros([HP], tl.float32)
    start = 0
    while start < block * BN:
        at = start + tile[None, :]
        seen = (head[:, None] < H) & (at >= 1)
        a = tl.load(a_ptr + logits + at - 1, mask=seen, other=_LOG_ZERO).to(tl.float32)
        new_top = tl.maximum(top, tl.max(a, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(a - new_top[:, None]), 1)
        top = new_top
        start += BN
    carry = tl.where(total > 0, top + tl.log(tl.maximum(total, 1.0e-30)), _LOG_ZERO)

    position = block * BN + tile
    inside = (head[:, None] < H) & (position[None, :] < N)
    later = inside & (position[None, :] >= 1)
    a = tl.load(a_ptr + logits + position[None, :] - 1, mask=later, other=_LOG_ZERO)
    b = tl.load(b_ptr + logits + position[None, :], mask=inside, other=0.0).to(tl.float32)
    prefix = tl.associative_scan(a.to(tl.float32), 1, _log_add_exp)
    prefix = _log_add_exp(carry[:, None], prefix)
    w = tl.where(later, 1.0 / (1.0 + tl.exp(tl.minimum(prefix - b, 80.0))), 0.0)
    tl.store(w_ptr + logits + position[None, :], w, mask=inside)
    tl.store(prefix_ptr + logits + position[None, :], prefix, mask=inside)

    coef = coef_ptr + row * (H + 2) * N + position
    is_e = (position == 0).to(tl.float32)
    tl.store(coef, 1.0 - is_e, mask=position < N)
    tl.store(coef + N, is_e, mask=position < N)
    tl.store(coef[None, :] + (head[:, None] + 2) * N, w, mask=inside)

    span = span_ptr + row * (H + 2) * D
    out = x_ptr + row * N * D + position[:, None].to(tl.int64) * D
    w_t = tl.trans(w)  # (BN, HP)
    for left in range(0, D, BD):
        column = left + tl.arange(0, BD)
        here = column < D
        base_m = tl.load(span + column, mask=here, other=0.0).to(tl.float32)
        base_e = tl.load(span + D + column, mask=here, other=0.0).to(tl.float32)
        u = tl.load(
            span + (head[:, None] + 2) * D + column[None, :],
            mask=(head[:, None] < H) & here[None, :],
            other=0.0,
        ).to(tl.float32)
        base = tl.where(position[:, None] == 0, base_e[None, :], base_m[None, :])
        x = base + tl.dot(w_t, u, input_precision=PRECISION)
        tl.store(out + column[None, :], x, mask=(position[:, None] < N) & here[None, :])


@triton.jit
def affine_backward_kernel(
    grad_x_ptr,  # (B, N, d)
    span_ptr,  # (B, S, d)
    w_ptr,  # (B, H, N) fp32
    grad_w_ptr,  # (B, H, N) fp32, out
    partial_ptr,  # (B, blocks, S, d) fp32, out: gradient of span from each block of positions
    H,
    N,
    D: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One read of grad_x serves all three sums. Blocks of positions leave their share of the
    gradient of span apart, so the sum over them has a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    head = tl.arange(0, HP)
    position = block * BN + tl.arange(0, BN)
    inside = (head[:, None] < H) & (position[None, :] < N)
    at = row * H * N + head[:, None] * N + position[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_w = tl.zeros([HP, BN], tl.float32)
    span = span_ptr + row * (H + 2) * D
    partial = partial_ptr + (row * tl.num_programs(1) + block) * (H + 2) * D
    grad_row = grad_x_ptr + row * N * D + position[:, None].to(tl.int64) * D
    for left in range(0, D, BD):
        column = left + tl.arange(0, BD)
        here = column < D
        u_at = (head[:, None] + 2) * D + column[None, :]
        u_mask = (head[:, None] < H) & here[None, :]
        u = tl.load(span + u_at, mask=u_mask, other=0.0).to(tl.float32)
        grad = tl.load(
            grad_row + column[None, :],
            mask=(position[:, None] < N) & here[None, :],
            other=0.0,
        ).to(tl.float32)
        grad_w += tl.dot(u, tl.trans(grad), input_precision=PRECISION)
        tl.store(partial + u_at, tl.dot(w, grad, input_precision=PRECISION), mask=u_mask)
        grad_e = tl.sum(tl.where(position[:, None] == 0, grad, 0.0), 0)
        grad_m = tl.sum(tl.where(position[:, None] == 0, 0.0, grad), 0)
        tl.store(partial + column, grad_m, mask=here)
        tl.store(partial + D + column, grad_e, mask=here)
    tl.store(grad_w_ptr + at, grad_w, mask=inside)


@triton.jit
def scan_backward_kernel(
    grad_w_ptr,  # (B, H, N) fp32
    grad_coef_ptr,  # (B, S, N); read only with HAS_GRAD_COEF
    a_ptr,  # (B, H, N) fp32
    prefix_ptr,  # (B, H, N) fp32
    w_ptr,  # (B, H, N) fp32
    grad_a_ptr,  # (B, H, N) fp32, out
    grad_b_ptr,  # (B, H, N) fp32, out
    H,
    N,
    HAS_GRAD_COEF: tl.constexpr,
    BN: tl.constexpr,
):
    """∂b = z and ∂a_{i−1} = −exp(a_{i−1} − prefix_i) T_i, z = ∂w · w (1 − w), where
    T_i = z_i + exp(prefix_i − prefix_{i+1}) T_{i+1}: every factor at most 1.

    One program per row and head, from the last position to the first.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    logits = (row * H + head) * N
    tile = tl.arange(0, BN)
    carry = 0.0
    start = 0
    while start < N:
        position = N - 1 - start - tile
        inside = position >= 0
        w = tl.load(w_ptr + logits + position, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_w_ptr + logits + position, mask=inside, other=0.0).to(tl.float32)
        if HAS_GRAD_COEF:
            grad += tl.load(
                grad_coef_ptr + (row * (H + 2) + head + 2) * N + position, mask=inside, other=0.0
            ).to(tl.float32)
        z = grad * w * (1.0 - w)  # 0 at position 0, where w is
        tl.store(grad_b_ptr + logits + position, z, mask=inside)
        prefix = tl.load(prefix_ptr + logits + position, mask=inside, other=0.0)
        has_next = inside & (position + 1 < N)
        next_prefix = tl.load(prefix_ptr + logits + position + 1, mask=has_next, other=0.0)
        later = position >= 1
        decay = tl.where(has_next & later, tl.exp(tl.minimum(prefix - next_prefix, 0.0)), 0.0)
        decay, value = tl.associative_scan((decay, z), 0, _recurrence)
        total = value + decay * carry
        carry = tl.sum(tl.where(tile == BN - 1, total, 0.0), 0)
        a = tl.load(a_ptr + logits + position - 1, mask=later, other=0.0)
        grad_a = -tl.exp(tl.minimum(a - prefix, 0.0)) * total
        tl.store(grad_a_ptr + logits + position - 1, grad_a, mask=later)
        start += BN
    tl.store(grad_a_ptr + logits + N - 1, 0.0)


def _tiles(length: int, heads: int, size: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(heads))
    most = {16: 64, 32: 32}.get(padded, 16)  # fits 99 KiB of shared memory in fp32
    return {
        "HP": padded,
        "BN": min(most, max(16, triton.next_power_of_2(length))),
        "BD": min(128, max(16, triton.next_power_of_2(size))),
    }


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of products: bf16 is exact in tf32, fp32 gets them in full."""
    return "ieee" if dtype == torch.float32 else "tf32"


class _AffineScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,  # (B, H, N) fp32
        b: Tensor,  # (B, H, N) fp32
        span: Tensor,  # (B, S, d)
    ) -> tuple[Tensor, Tensor]:  # x (B, N, d), coef (B, S, N)
        a, b, span = a.contiguous(), b.contiguous(), span.contiguous()
        (rows, heads, length), size = a.shape, span.shape[-1]
        x = span.new_empty(rows, length, size)
        coef = span.new_empty(rows, heads + 2, length)
        w, prefix = torch.empty_like(a), torch.empty_like(a)
        tiles = _tiles(length, heads, size)
        with torch.cuda.device_of(span):
            affine_scan_forward_kernel[(rows, triton.cdiv(length, tiles["BN"]))](
                a, b, span, x, coef, w, prefix, heads, length,
                D=size, PRECISION=_precision(span.dtype), **tiles,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, prefix, w, span)
        return x, coef

    @staticmethod
    def backward(
        ctx: Any, grad_x: Tensor, grad_coef: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, prefix, w, span = ctx.saved_tensors
        (rows, heads, length), size = a.shape, span.shape[-1]
        tiles = _tiles(length, heads, size)
        blocks = triton.cdiv(length, tiles["BN"])
        partial = span.new_empty(rows, blocks, heads + 2, size, dtype=torch.float32)
        grad_w, grad_a, grad_b = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
        with torch.cuda.device_of(span):
            affine_backward_kernel[(rows, blocks)](
                grad_x.contiguous(), span, w, grad_w, partial, heads, length,
                D=size, PRECISION=_precision(span.dtype), **tiles,
            )  # fmt: skip
            scan_backward_kernel[(rows, heads)](
                grad_w, grad_w if grad_coef is None else grad_coef.contiguous(), a, prefix, w,
                grad_a, grad_b, heads, length,
                HAS_GRAD_COEF=grad_coef is not None,
                BN=min(1024, max(16, triton.next_power_of_2(length))),
            )  # fmt: skip
        return grad_a, grad_b, partial.sum(1).to(span.dtype)


def affine_scan(a: Tensor, b: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """Compute w = sigmoid(b − prefix log-sum-exp of a), and x, the span combined by them."""
    if span.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in fp32; use 'torch' for float64 weights")
    return _AffineScan.apply(a, b, span)
