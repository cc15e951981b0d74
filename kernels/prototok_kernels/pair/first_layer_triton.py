"""Triton kernels of the collapsed first layer: scan, affine combination, and their gradient.

Beside first_layer.py, not in it, so that a machine without triton never imports this file.

Loops whose bound is known at launch only are `while` loops: the interpreter of triton 3.6 cannot
make a `range` of a kernel argument under numpy ≥ 2.4.

Letters: B rows, N positions, d hidden size, H heads, P vectors of a prefix, S = 2 + H (1 + P)
spanning vectors per row: base of m, base of e, and 1 + P kinds of H vectors each, which are of e
and, behind a prefix, of m and of every vector of it but the first (constants); HP heads padded for
the tensor cores, BN and BD tiles of N and d.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prototok_kernels.pair.scan import with_constants

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
def _vectors_of_kind(span, kind, head, column, H, D: tl.constexpr):
    """Load the spanning vectors of a kind in fp32, (HP, BD); `span` is that of the row."""
    return tl.load(
        span + (2 + kind * H + head[:, None]) * D + column[None, :],
        mask=(head[:, None] < H) & (column[None, :] < D),
        other=0.0,
    ).to(tl.float32)


@triton.jit
def affine_scan_forward_kernel(
    a_ptr,  # (B, H, N) fp32
    b_ptr,  # (B, H, N) fp32
    u_ptr,  # (B, P, H, N) fp32; read only with P
    span_ptr,  # (B, S, d)
    x_ptr,  # (B, N, d), out
    coef_ptr,  # (B, S, N), out
    w_ptr,  # (B, 1 + P, H, N) fp32, out; without a prefix 0 at position 0
    sum_ptr,  # (B, H, N) fp32, out; at i the log-sum-exp of a over distances below i
    H,
    N,
    P: tl.constexpr,
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
    of_m = tl.associative_scan(a.to(tl.float32), 1, _log_add_exp)
    of_m = _log_add_exp(carry[:, None], of_m)
    tl.store(sum_ptr + logits + position[None, :], of_m, mask=inside)
    u_at = u_ptr + row * P * H * N + head[:, None] * N + position[None, :]
    if P == 0:
        w = tl.where(later, 1.0 / (1.0 + tl.exp(tl.minimum(of_m - b, 80.0))), 0.0)
    else:
        best = tl.maximum(of_m, b)
        for j in range(P):
            best = tl.maximum(best, tl.load(u_at + j * H * N, mask=inside, other=0.0))
        w = tl.exp(b - best)
        of_all_m = tl.exp(of_m - best)
        share = w + of_all_m
        for j in range(P):
            share += tl.exp(tl.load(u_at + j * H * N, mask=inside, other=0.0) - best)
        share = 1.0 / share
        w *= share
        of_all_m *= share

    coef = coef_ptr + row * (2 + H * (1 + P)) * N + position
    is_e = (position == 0).to(tl.float32)
    tl.store(coef, 1.0 - is_e, mask=position < N)
    tl.store(coef + N, is_e, mask=position < N)
    coef_at = coef[None, :] + (head[:, None] + 2) * N
    w_at = w_ptr + row * (1 + P) * H * N + head[:, None] * N + position[None, :]
    tl.store(coef_at, w, mask=inside)
    tl.store(w_at, w, mask=inside)
    if P > 0:
        tl.store(coef_at + H * N, of_all_m, mask=inside)
        tl.store(w_at + H * N, of_all_m, mask=inside)
        for j in range(1, P):
            of_key = tl.exp(tl.load(u_at + j * H * N, mask=inside, other=0.0) - best) * share
            tl.store(coef_at + (1 + j) * H * N, of_key, mask=inside)
            tl.store(w_at + (1 + j) * H * N, of_key, mask=inside)

    span = span_ptr + row * (2 + H * (1 + P)) * D
    out = x_ptr + row * N * D + position[:, None].to(tl.int64) * D
    w_t = tl.trans(w)  # (BN, HP)
    for left in range(0, D, BD):
        column = left + tl.arange(0, BD)
        here = column < D
        base_m = tl.load(span + column, mask=here, other=0.0).to(tl.float32)
        base_e = tl.load(span + D + column, mask=here, other=0.0).to(tl.float32)
        base = tl.where(position[:, None] == 0, base_e[None, :], base_m[None, :])
        u = _vectors_of_kind(span, 0, head, column, H, D)
        x = base + tl.dot(w_t, u, input_precision=PRECISION)
        if P > 0:
            u = _vectors_of_kind(span, 1, head, column, H, D)
            x += tl.dot(tl.trans(of_all_m), u, input_precision=PRECISION)
            for j in range(1, P):
                of_key = tl.exp(tl.load(u_at + j * H * N, mask=inside, other=0.0) - best) * share
                u = _vectors_of_kind(span, 1 + j, head, column, H, D)
                x += tl.dot(tl.trans(of_key), u, input_precision=PRECISION)
        tl.store(out + column[None, :], x, mask=(position[:, None] < N) & here[None, :])


@triton.jit
def affine_backward_kernel(
    grad_x_ptr,  # (B, N, d)
    span_ptr,  # (B, S, d)
    w_ptr,  # (B, 1 + P, H, N) fp32
    grad_w_ptr,  # (B, 1 + P, H, N) fp32, out
    partial_ptr,  # (B, blocks, own, d) fp32, out: gradient of span from each block of positions
    H,
    N,
    P: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One read of grad_x serves all sums of a kind, each of which is a program's own; the constants
    of a prefix have no gradient. Blocks of positions leave their share of the gradient of span
    apart, so the sum over them has a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    kind = 0 if P == 0 else tl.program_id(2)
    own = 1 if P == 0 else 2
    head = tl.arange(0, HP)
    position = block * BN + tl.arange(0, BN)
    inside = (head[:, None] < H) & (position[None, :] < N)
    at = ((row * (1 + P) + kind) * H + head[:, None]) * N + position[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad_w = tl.zeros([HP, BN], tl.float32)
    span = span_ptr + row * (2 + H * (1 + P)) * D
    partial = partial_ptr + (row * tl.num_programs(1) + block) * (2 + H * own) * D
    grad_row = grad_x_ptr + row * N * D + position[:, None].to(tl.int64) * D
    for left in range(0, D, BD):
        column = left + tl.arange(0, BD)
        here = column < D
        u = _vectors_of_kind(span, kind, head, column, H, D)
        grad = tl.load(
            grad_row + column[None, :],
            mask=(position[:, None] < N) & here[None, :],
            other=0.0,
        ).to(tl.float32)
        grad_w += tl.dot(u, tl.trans(grad), input_precision=PRECISION)
        vector = kind * H + head[:, None]  # masks, not branches, which take more registers
        tl.store(
            partial + (2 + vector) * D + column[None, :],
            tl.dot(w, grad, input_precision=PRECISION),
            mask=(head[:, None] < H) & (vector < own * H) & here[None, :],
        )
        grad_e = tl.sum(tl.where(position[:, None] == 0, grad, 0.0), 0)
        grad_m = tl.sum(tl.where(position[:, None] == 0, 0.0, grad), 0)
        of_bases = kind * D + column < D  # once, by the programs of the first kind
        tl.store(partial + column, grad_m, mask=of_bases)
        tl.store(partial + D + column, grad_e, mask=of_bases)
    tl.store(grad_w_ptr + at, grad_w, mask=inside)


@triton.jit
def _grad_of_weight(grad_w, grad_coef, offset, inside, HAS_GRAD_COEF: tl.constexpr):
    """Gradient of a weight of the combinations: what x says of it, and what coef says."""
    grad = tl.load(grad_w + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_GRAD_COEF:
        grad += tl.load(grad_coef + offset, mask=inside, other=0.0).to(tl.float32)
    return grad


@triton.jit
def scan_backward_kernel(
    grad_w_ptr,  # (B, 1 + P, H, N) fp32
    grad_coef_ptr,  # (B, S, N); read only with HAS_GRAD_COEF
    a_ptr,  # (B, H, N) fp32
    sum_ptr,  # (B, H, N) fp32
    w_ptr,  # (B, 1 + P, H, N) fp32
    grad_a_ptr,  # (B, H, N) fp32, out
    grad_b_ptr,  # (B, H, N) fp32, out
    grad_u_ptr,  # (B, P, H, N) fp32, out; written only with P
    H,
    N,
    P: tl.constexpr,
    HAS_GRAD_COEF: tl.constexpr,
    BN: tl.constexpr,
):
    """∂b = z and ∂a_{i−1} = −exp(a_{i−1} − sum_i) T_i, z = ∂w · w (1 − w), where
    T_i = z_i + exp(sum_i − sum_{i+1}) T_{i+1}: every factor at most 1.

    Behind a prefix the slope of each logit is its weight times what the weight's gradient is above
    their mean, and −z that of all m together. One program per row and head, from the last position
    to the first.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    logits = (row * H + head) * N
    weights = (row * (1 + P) * H + head) * N  # of the first kind; the next is H N further on
    grad_w = grad_w_ptr + weights
    grad_coef = grad_coef_ptr + (row * (2 + H * (1 + P)) + 2 + head) * N
    keys = grad_u_ptr + (row * P * H + head) * N
    tile = tl.arange(0, BN)
    carry = 0.0
    start = 0
    while start < N:
        position = N - 1 - start - tile
        inside = position >= 0
        w = tl.load(w_ptr + weights + position, mask=inside, other=0.0).to(tl.float32)
        grad = _grad_of_weight(grad_w, grad_coef, position, inside, HAS_GRAD_COEF)
        if P == 0:
            z = grad * w * (1.0 - w)  # 0 at position 0, where w is
            tl.store(grad_b_ptr + logits + position, z, mask=inside)
        else:
            mean = w * grad
            first = 1.0 - w  # in the end the weight of the prefix's first vector
            for kind in range(1, 1 + P):
                at = kind * H * N + position
                of_kind = tl.load(w_ptr + weights + at, mask=inside, other=0.0)
                mean += of_kind * _grad_of_weight(grad_w, grad_coef, at, inside, HAS_GRAD_COEF)
                first -= of_kind
            tl.store(grad_b_ptr + logits + position, w * (grad - mean), mask=inside)
            tl.store(keys + position, -first * mean, mask=inside)
            for j in range(1, P):
                at = (1 + j) * H * N + position
                of_key = tl.load(w_ptr + weights + at, mask=inside, other=0.0)
                slope = _grad_of_weight(grad_w, grad_coef, at, inside, HAS_GRAD_COEF) - mean
                tl.store(keys + j * H * N + position, of_key * slope, mask=inside)
            at = H * N + position
            of_all_m = tl.load(w_ptr + weights + at, mask=inside, other=0.0)
            z = mean - _grad_of_weight(grad_w, grad_coef, at, inside, HAS_GRAD_COEF)
            z *= of_all_m
        of_m = tl.load(sum_ptr + logits + position, mask=inside, other=0.0)
        has_next = inside & (position + 1 < N)
        next_of_m = tl.load(sum_ptr + logits + position + 1, mask=has_next, other=0.0)
        later = position >= 1
        decay = tl.where(has_next & later, tl.exp(tl.minimum(of_m - next_of_m, 0.0)), 0.0)
        decay, value = tl.associative_scan((decay, z), 0, _recurrence)
        total = value + decay * carry
        carry = tl.sum(tl.where(tile == BN - 1, total, 0.0), 0)
        a = tl.load(a_ptr + logits + position - 1, mask=later, other=0.0)
        grad_a = -tl.exp(tl.minimum(a - of_m, 0.0)) * total
        tl.store(grad_a_ptr + logits + position - 1, grad_a, mask=later)
        start += BN
    tl.store(grad_a_ptr + logits + N - 1, 0.0)


def _tiles(length: int, front: int, span: Tensor) -> dict[str, int]:
    heads, size = (span.shape[1] - 2) // (1 + front), span.shape[2]
    wide = span.dtype == torch.float32
    padded = max(16, triton.next_power_of_2(heads))
    most = {16: 64, 32: 32}.get(padded, 16)  # fits 99 KiB of shared memory in fp32
    return {
        "HP": padded,
        "BN": min(most, max(16, triton.next_power_of_2(length))),
        # In fp32 the weights of a prefix take the registers of most columns.
        "BD": min(32 if front and wide else 128, max(16, triton.next_power_of_2(size))),
        # And products in full take those of twice the threads.
        "num_warps": 8 if wide else 4,
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
        u: Tensor | None,  # (B, P, H, N) fp32
        span: Tensor,  # (B, S, d)
    ) -> tuple[Tensor, Tensor]:  # x (B, N, d), coef (B, S, N)
        a, b, span = a.contiguous(), b.contiguous(), span.contiguous()
        (rows, heads, length), size = a.shape, span.shape[-1]
        front = 0 if u is None else u.shape[1]
        x = span.new_empty(rows, length, size)
        coef = span.new_empty(rows, span.shape[1], length)
        w, sums = a.new_empty(rows, 1 + front, heads, length), torch.empty_like(a)
        tiles = _tiles(length, front, span)
        with torch.cuda.device_of(span):
            affine_scan_forward_kernel[(rows, triton.cdiv(length, tiles["BN"]))](
                a, b, a if u is None else u.contiguous(), span, x, coef, w, sums, heads, length,
                P=front, D=size, PRECISION=_precision(span.dtype), **tiles,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, sums, w, span)
        return x, coef

    @staticmethod
    def backward(
        ctx: Any, grad_x: Tensor, grad_coef: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        a, sums, w, span = ctx.saved_tensors
        (rows, heads, length), size = a.shape, span.shape[-1]
        front = w.shape[1] - 1
        tiles = _tiles(length, front, span)
        # Two products at a time: half the columns, or triton 3.6 runs out of registers on sm_100.
        tiles["BD"] = min(64, tiles["BD"])
        blocks, own = triton.cdiv(length, tiles["BN"]), 2 + heads * min(1 + front, 2)
        partial = span.new_empty(rows, blocks, own, size, dtype=torch.float32)
        grad_w, grad_a, grad_b = torch.empty_like(w), torch.empty_like(a), torch.empty_like(a)
        grad_u = a.new_empty(rows, front, heads, length) if front else None
        with torch.cuda.device_of(span):
            affine_backward_kernel[(rows, blocks, 1 + front)](
                grad_x.contiguous(), span, w, grad_w, partial, heads, length,
                P=front, D=size, PRECISION=_precision(span.dtype), **tiles,
            )  # fmt: skip
            scan_backward_kernel[(rows, heads)](
                grad_w, grad_w if grad_coef is None else grad_coef.contiguous(), a, sums, w,
                grad_a, grad_b, grad_b if grad_u is None else grad_u, heads, length,
                P=front, HAS_GRAD_COEF=grad_coef is not None,
                BN=min(1024, max(16, triton.next_power_of_2(length))),
            )  # fmt: skip
        return grad_a, grad_b, grad_u, with_constants(partial.sum(1).to(span.dtype), span)


def affine_scan(
    a: Tensor,  # (B, H, N) fp32
    b: Tensor,  # (B, H, N) fp32
    u: Tensor | None,  # (B, P, H, N) fp32; None: no prefix
    span: Tensor,  # (B, S, d)
) -> tuple[Tensor, Tensor]:  # x (B, N, d), coef (B, S, N)
    """Compute the weights of logits a, b and u (scan.Logits), and x, the span combined by them."""
    if span.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in fp32; use 'torch' for float64 weights")
    return _AffineScan.apply(a, b, u, span)
