"""Affine combinations of a few vectors with an activation behind them, never written before it.

inner = act(coefᵀ · vectors + bias), gated or not, as the MLP of a first block in closed form has it
(first_layer.py). What stands before the activation is S products an element, which cost less than
reading it: so it is made anew backward.

Beside first_layer.py, not in it, so that a machine without triton never imports this file.

At most 128 spanning vectors: beyond, a tile of them would not fit (plan.py).

Letters: B rows, N positions, S spanning vectors per row, I inner size of the MLP; SP: S padded for
the tensor cores, BN and BI tiles of N and I.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prototok_kernels.activation import ACTIVATIONS, _value_and_slope


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
    grad,  # (B, N, I); read only with BACKWARD
    coef,  # (B, S, N)
    vectors,  # (B, S, I), gated (B, S, 2 I)
    bias,  # (I,), gated (2 I,); read only with HAS_BIAS
    out,  # (B, N, I); with BACKWARD, gated, (B, N, 2 I)
    S,
    N,
    INNER: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
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
    value, slope = _value_and_slope(_with_bias(z, bias, column, inside, HAS_BIAS), KIND)
    if GATED:
        tile = _vectors(vectors, row, INNER + column, inside, S, wide, SP)
        up = tl.dot(weights, tile, input_precision=PRECISION)
        up = _with_bias(up, bias, INNER + column, inside, HAS_BIAS)
    at = row * N + position[:, None]
    mask = (position[:, None] < N) & inside[None, :]
    if BACKWARD:
        g = tl.load(grad + at * INNER + column[None, :], mask=mask, other=0.0).to(tl.float32)
        to = out + at * wide + column[None, :]
        if GATED:
            tl.store(to + INNER, (g * value).to(out.dtype.element_ty), mask=mask)
            g *= up
        tl.store(to, (g * slope).to(out.dtype.element_ty), mask=mask)
    else:
        if GATED:
            value *= up
        to = out + at * INNER + column[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=mask)


def _pass(
    grad: Tensor | None,  # (B, N, I); None: forward
    coef: Tensor,
    vectors: Tensor,
    bias: Tensor | None,
    name: str,
    gated: bool,
) -> Tensor:
    coef, vectors = coef.contiguous(), vectors.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, spanning, length), wide = coef.shape, vectors.shape[-1]
    inner = wide // 2 if gated else wide
    full = vectors.dtype == torch.float32
    padded = max(16, triton.next_power_of_2(spanning))
    most = 64 if padded <= 64 and not full else 32
    out = vectors.new_empty(rows, length, inner if grad is None else wide)
    block_n = min(most, max(16, triton.next_power_of_2(length)))
    block_i = min(most, max(16, triton.next_power_of_2(inner)))
    with torch.cuda.device_of(vectors):
        combined_activation_kernel[
            rows, triton.cdiv(length, block_n), triton.cdiv(inner, block_i)
        ](
            vectors if grad is None else grad.contiguous(), coef, vectors,
            vectors if bias is None else bias, out, spanning, length, INNER=inner,
            KIND=ACTIVATIONS[name], GATED=gated, HAS_BIAS=bias is not None,
            BACKWARD=grad is not None, SP=padded, BN=block_n, BI=block_i,
            PRECISION="ieee" if full else "tf32", num_warps=8,
        )  # fmt: skip
    return out


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
    return _pass(None, coef, vectors, bias, name, gated)


def combined_activation_backward(
    grad: Tensor,  # (B, N, I)
    coef: Tensor,  # (B, S, N)
    vectors: Tensor,  # (B, S, I), gated (B, S, 2 I)
    bias: Tensor | None,
    name: str,
    gated: bool,
) -> Tensor:  # (B, N, I), gated (B, N, 2 I)
    """Return the gradient of coefᵀ · vectors, which is made again.

    It is written once, for the two products that carry it on: summing it where it arises took two
    kernels, each of which made the activation again (docs/dev/log.md).
    """
    return _pass(grad, coef, vectors, bias, name, gated)
