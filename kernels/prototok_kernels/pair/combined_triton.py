"""Affine combinations of a few vectors with an activation behind them, never written before it.

inner = act(coefᵀ · vectors + bias), gated or not, as the MLP of a first block in closed form has it
(first_layer.py). What stands before the activation is S products an element, which cost less than
reading it: so it is made anew in each kernel, and its gradient, too, is summed where it arises.

Beside first_layer.py, not in it, so that a machine without triton never imports this file. Loops
whose bound is known at launch only are `while` loops: see first_layer_triton.py.

At most 128 spanning vectors: beyond, a tile of them would not fit (plan.py).

Letters: B rows, N positions, S spanning vectors per row, I inner size of the MLP; SP: S padded for
the tensor cores, BN and BI tiles of N and I.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prototok_kernels.activation import ACTIVATIONS, _value_and_slope
from prototok_kernels.backend import capability


@triton.jit
def _coefficients(coef, row, position, S, N, SP: tl.constexpr):
    """Load the coefficients of some positions, (SP, BN) fp32."""
    s = tl.arange(0, SP)[:, None]
    inside = (s < S) & (position[None, :] < N)
    return tl.load(coef + (row * S + s) * N + position[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _vectors(vectors, row, column, inside, S, WIDE: tl.constexpr, SP: tl.constexpr):
    """Load a tile of columns of the vectors, (SP, BI) fp32."""
    s = tl.arange(0, SP)[:, None]
    return tl.load(
        vectors + (row * S + s) * WIDE + column[None, :],
        mask=(s < S) & inside[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _with_bias(z, bias, column, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def combined_activation_kernel(
    coef,  # (B, S, N)
    vectors,  # (B, S, I), gated (B, S, 2 I)
    bias,  # (I,), gated (2 I,); read only with HAS_BIAS
    inner,  # (B, N, I), out
    S,
    N,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SP: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wide: tl.constexpr = 2 * INNER if GATED else INNER
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BN + tl.arange(0, BN)
    column = tl.program_id(2) * BI + tl.arange(0, BI)
    inside = column < INNER
    weights = tl.trans(_coefficients(coef, row, position, S, N, SP))  # (BN, SP)
    tile = _vectors(vectors, row, column, inside, S, wide, SP)
    z = tl.dot(weights, tile, input_precision=PRECISION)
    value, _ = _value_and_slope(_with_bias(z, bias, column, inside, HAS_BIAS), KIND)
    if GATED:
        tile = _vectors(vectors, row, INNER + column, inside, S, wide, SP)
        up = tl.dot(weights, tile, input_precision=PRECISION)
        value *= _with_bias(up, bias, INNER + column, inside, HAS_BIAS)
    to = inner + (row * N + position[:, None]) * INNER + column[None, :]
    mask = (position[:, None] < N) & inside[None, :]
    tl.store(to, value.to(inner.dtype.element_ty), mask=mask)


@triton.jit
def combined_backward_coef_kernel(
    grad,  # (B, N, I)
    coef,  # (B, S, N)
    vectors,  # (B, S, I), gated (B, S, 2 I)
    bias,  # (I,), gated (2 I,); read only with HAS_BIAS
    grad_coef,  # (B, S, N) fp32, out
    S,
    N,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SP: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a row and block of positions, through all columns."""
    wide: tl.constexpr = 2 * INNER if GATED else INNER
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BN + tl.arange(0, BN)
    weights = tl.trans(_coefficients(coef, row, position, S, N, SP))  # (BN, SP)
    total = tl.zeros([BN, SP], tl.float32)
    at = grad + (row * N + position[:, None]) * INNER
    for left in range(0, INNER, BI):
        column = left + tl.arange(0, BI)
        inside = column < INNER
        mask = (position[:, None] < N) & inside[None, :]
        g = tl.load(at + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tile = _vectors(vectors, row, column, inside, S, wide, SP)
        z = tl.dot(weights, tile, input_precision=PRECISION)
        value, slope = _value_and_slope(_with_bias(z, bias, column, inside, HAS_BIAS), KIND)
        if GATED:
            more = _vectors(vectors, row, INNER + column, inside, S, wide, SP)
            up = tl.dot(weights, more, input_precision=PRECISION)
            up = _with_bias(up, bias, INNER + column, inside, HAS_BIAS)
            total += tl.dot(g * value, tl.trans(more), input_precision=PRECISION)
            g *= up
        total += tl.dot(g * slope, tl.trans(tile), input_precision=PRECISION)
    s = tl.arange(0, SP)[:, None]
    inside = (s < S) & (position[None, :] < N)
    tl.store(grad_coef + (row * S + s) * N + position[None, :], tl.trans(total), mask=inside)


@triton.jit
def combined_backward_vectors_kernel(
    grad,  # (B, N, I)
    coef,  # (B, S, N)
    vectors,  # (B, S, I), gated (B, S, 2 I)
    bias,  # (I,), gated (2 I,); read only with HAS_BIAS
    grad_vectors,  # (B, OWN, I), gated (B, OWN, 2 I), out
    S,
    OWN,  # ≤ S: the others are constants
    N,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SP: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a row and block of columns, through all positions."""
    wide: tl.constexpr = 2 * INNER if GATED else INNER
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = column < INNER
    tile = _vectors(vectors, row, column, inside, S, wide, SP)
    total = tl.zeros([SP, BI], tl.float32)
    if GATED:
        more = _vectors(vectors, row, INNER + column, inside, S, wide, SP)
        total_up = tl.zeros([SP, BI], tl.float32)
    start = 0
    while start < N:
        position = start + tl.arange(0, BN)
        weights = _coefficients(coef, row, position, S, N, SP)  # (SP, BN)
        mask = (position[:, None] < N) & inside[None, :]
        at = grad + (row * N + position[:, None]) * INNER + column[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        turned = tl.trans(weights)
        z = tl.dot(turned, tile, input_precision=PRECISION)
        value, slope = _value_and_slope(_with_bias(z, bias, column, inside, HAS_BIAS), KIND)
        if GATED:
            up = tl.dot(turned, more, input_precision=PRECISION)
            up = _with_bias(up, bias, INNER + column, inside, HAS_BIAS)
            total_up += tl.dot(weights, g * value, input_precision=PRECISION)
            g *= up
        total += tl.dot(weights, g * slope, input_precision=PRECISION)
        start += BN
    s = tl.arange(0, SP)[:, None]
    to = grad_vectors + (row * OWN + s) * wide + column[None, :]
    mask = (s < OWN) & inside[None, :]
    dtype = grad_vectors.dtype.element_ty
    tl.store(to, total.to(dtype), mask=mask)
    if GATED:
        tl.store(to + INNER, total_up.to(dtype), mask=mask)


def _options(
    coef: Tensor, vectors: Tensor, bias: Tensor | None, name: str, gated: bool
) -> dict[str, Any]:
    (_, spanning, length), wide = coef.shape, vectors.shape[-1]
    inner = wide // 2 if gated else wide
    full = vectors.dtype == torch.float32
    padded = max(16, triton.next_power_of_2(spanning))
    most = 64 if padded <= 64 and not full else 32
    return {
        "INNER": inner, "KIND": ACTIVATIONS[name], "GATED": gated, "HAS_BIAS": bias is not None,
        "SP": padded, "BN": min(most, max(16, triton.next_power_of_2(length))),
        "BI": min(most, max(16, triton.next_power_of_2(inner))),
        "PRECISION": "ieee" if full else "tf32", "num_warps": 8,
    }  # fmt: skip


def combined_activation(
    coef: Tensor,  # (B, S, N)
    vectors: Tensor,  # (B, S, I), gated (B, S, 2 I)
    bias: Tensor | None,  # (I,), gated (2 I,)
    name: str,
    gated: bool,
) -> Tensor:  # (B, N, I)
    """Compute act(coefᵀ · vectors + bias); `name` and `gated` are those of `activation`.

    Not differentiable: `combined_activation_backward` is its gradient. Arithmetic is fp32.
    """
    coef, vectors = coef.contiguous(), vectors.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, spanning, length), o = coef.shape, _options(coef, vectors, bias, name, gated)
    inner = vectors.new_empty(rows, length, o["INNER"])
    grid = (rows, triton.cdiv(length, o["BN"]), triton.cdiv(o["INNER"], o["BI"]))
    with torch.cuda.device_of(vectors):
        combined_activation_kernel[grid](
            coef, vectors, vectors if bias is None else bias, inner, spanning, length, **o
        )
    return inner


def combined_activation_backward(
    grad: Tensor,  # (B, N, I)
    coef: Tensor,  # (B, S, N)
    vectors: Tensor,  # (B, S, I), gated (B, S, 2 I)
    own: int,  # the vectors that have a gradient: the first
    bias: Tensor | None,
    name: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of coef (B, S, N), in fp32, and of the first `own` vectors."""
    grad, coef, vectors = grad.contiguous(), coef.contiguous(), vectors.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, spanning, length), o = coef.shape, _options(coef, vectors, bias, name, gated)
    grad_coef = torch.empty_like(coef, dtype=torch.float32)
    grad_vectors = vectors.new_empty(rows, own, vectors.shape[-1])
    given = grad, coef, vectors, vectors if bias is None else bias
    # The sums take the registers that more columns would.
    o |= {"BI": min(32 if o["SP"] <= 64 else 16, o["BI"]), "num_stages": 2}
    of_vectors = dict(o)
    if gated:  # two of them, so that less fits without a stack
        if o["SP"] > 64:
            of_vectors["BN"] = 16
        elif capability(vectors.device) < 90:
            of_vectors["BI"] = 16
    with torch.cuda.device_of(vectors):
        combined_backward_coef_kernel[(rows, triton.cdiv(length, o["BN"]))](
            *given, grad_coef, spanning, length, **o
        )
        combined_backward_vectors_kernel[(rows, triton.cdiv(o["INNER"], of_vectors["BI"]))](
            *given, grad_vectors, spanning, own, length, **of_vectors
        )
    return grad_coef, grad_vectors
