"""The two vectors of [e, m, m, …, m] through their first layer, in a few Triton kernels.

What `first_layer` does of them in plain torch, small operation by small operation, is here two
kernels around products each way: `pair_input` makes of e and m what the products read, and
`pair_logits` of q, k and v what the scan reads. On a GPU each of those operations would cost a
launch.

Beside first_layer.py, not in it, so that a machine without triton never imports this file. Loops
whose bound is known at launch only are `while` loops: see first_layer_triton.py.

Letters: B rows, N positions, d hidden size, H heads, K key-value heads, c head size, r rotary size,
P vectors of a prefix, S spanning vectors per row. A pair is (2, B, …): of m, then of e.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prototok_kernels.layers import (
    DecoderLayer,
    NeoXLayer,
    inner_activation,
    inner_activation_backward,
    inner_projection,
    is_parallel,
)
from prototok_kernels.pair.logits_triton import (
    pair_logits_backward_kernel,
    pair_logits_kernel,
)
from prototok_kernels.pair.scan import Logits
from prototok_kernels.residual_norm import (
    launch_of_rows,
    normalised,
    normalised_backward,
    scaled,
)


@triton.jit
def _of_kind_m(kind, column, D: tl.constexpr):
    """Where a program of kind 0 stores or loads, that of m; one of kind 1, that of e, nowhere."""
    return column + kind * D < D


@triton.jit
def _vector(m, e, row, kind, column, D: tl.constexpr):
    """Load m's row where kind is 0 and e's where it is 1, in fp32."""
    at = row * D + column
    of_m = tl.load(m + at, mask=_of_kind_m(kind, column, D), other=0.0).to(tl.float32)
    of_e = tl.load(e + at, mask=_of_kind_m(1 - kind, column, D), other=0.0).to(tl.float32)
    return of_m + of_e


@triton.jit
def pair_input_kernel(
    m,  # (B, d)
    e,  # (B, d)
    constant,  # (d,), added to what begins the span; read only with HAS_CONSTANT
    weight,  # (d,)
    bias,  # (d,); read only with CENTRED
    second_weight,  # and of a second norm; read only with SECOND
    second_bias,
    normed,  # (2, B, d), out
    second,  # (2, B, d), out
    span,  # (B, S, d), out: the first two of S
    statistics,  # (2, B, 2) fp32, out: mean and inverse deviation
    rows,
    spanning,  # S
    eps,
    D: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    CENTRED: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,  # ≥ d
):
    """Cast a vector, normalise it, and begin the span with it. One program a vector."""
    vector = tl.program_id(0).to(tl.int64)
    row, kind = vector % rows, vector // rows
    column = tl.arange(0, BLOCK)
    inside = column < D
    dtype = normed.dtype.element_ty
    value = _vector(m, e, row, kind, column, D).to(dtype).to(tl.float32)
    base = value
    if HAS_CONSTANT:
        base += tl.load(constant + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(span + (row * spanning + kind) * D + column, base.to(dtype), mask=inside)
    mean, inverse, unit = normalised(value, inside, eps, D, CENTRED)
    value = scaled(unit, weight, bias, column, inside, CENTRED)
    tl.store(normed + vector * D + column, value.to(dtype), mask=inside)
    if SECOND:
        value = scaled(unit, second_weight, second_bias, column, inside, CENTRED)
        tl.store(second + vector * D + column, value.to(dtype), mask=inside)
    tl.store(statistics + 2 * vector, mean)
    tl.store(statistics + 2 * vector + 1, inverse)


@triton.jit
def pair_input_backward_kernel(
    m,  # (B, d)
    e,  # (B, d)
    weight,  # (d,)
    second_weight,  # (d,); read only with SECOND
    statistics,  # (2, B, 2) fp32
    grad_normed,  # (2, B, d)
    grad_second,  # (2, B, d); read only with SECOND
    grad_span,  # (B, S, d): the first two of S
    grad_m,  # (B, d), out
    grad_e,  # (B, d), out
    rows,
    spanning,  # S
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,  # ≥ d
):
    vector = tl.program_id(0).to(tl.int64)
    row, kind = vector % rows, vector // rows
    column = tl.arange(0, BLOCK)
    inside = column < D
    dtype = grad_normed.dtype.element_ty
    mean = tl.load(statistics + 2 * vector)
    inverse = tl.load(statistics + 2 * vector + 1)
    value = _vector(m, e, row, kind, column, D).to(dtype).to(tl.float32)
    centred = tl.where(inside, value - mean, 0.0)
    g = tl.load(grad_normed + vector * D + column, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if SECOND:
        more = tl.load(grad_second + vector * D + column, mask=inside, other=0.0).to(tl.float32)
        g += more * tl.load(second_weight + column, mask=inside, other=0.0).to(tl.float32)
    value = normalised_backward(g, centred, inverse, D, CENTRED)
    at = (row * spanning + kind) * D + column
    value += tl.load(grad_span + at, mask=inside, other=0.0).to(tl.float32)
    value = value.to(grad_m.dtype.element_ty)
    tl.store(grad_m + row * D + column, value, mask=_of_kind_m(kind, column, D))
    tl.store(grad_e + row * D + column, value, mask=_of_kind_m(1 - kind, column, D))


def _norms(layer: DecoderLayer) -> list[tuple[Tensor, Tensor]]:
    """List weight and bias of the norms of e and m; the weight stands for a bias that is not."""
    if not isinstance(layer, NeoXLayer):
        return [(layer.input_norm, layer.input_norm)]
    both = [(layer.input_norm, layer.input_norm_bias), (layer.post_norm, layer.post_norm_bias)]
    return both if layer.parallel else both[:1]


def _launch_of_heads(layer: DecoderLayer, cos: Tensor) -> dict[str, int]:
    size, half = layer.head_size, cos.shape[-1] // 2
    block_half = triton.next_power_of_2(half)
    return {
        "P": layer.prefix_length, "NORMED": layer.q_norm is not None, "SIZE": size, "HALF": half,
        "BLOCK_HALF": block_half, "BLOCK_REST": triton.next_power_of_2(max(1, size - 2 * half)),
        "BLOCK_SIZE": triton.next_power_of_2(size), "BN": max(16, min(128, 2048 // block_half)),
    }  # fmt: skip


def _pair(weight: Tensor) -> Tensor:
    """Give a weight to the products of m and of e, which lie in two places of the span."""
    return weight.expand(2, -1, -1)


class _Span(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, m: Tensor, e: Tensor, layer: DecoderLayer, cos: Tensor, sin: Tensor, backend: str
    ) -> tuple[Tensor, ...]:
        m, e = m.contiguous(), e.contiguous()
        (rows, size), heads, front = m.shape, layer.heads, layer.prefix_length
        length, norms = len(cos) - front, _norms(layer)
        constant, fixed = layer.constant_vectors
        own = 2 + heads * (2 if front else 1)
        span = m.new_empty(rows, own + len(fixed), size, dtype=layer.dtype)
        normed = [span.new_empty(2, rows, size) for _ in norms]
        statistics = span.new_empty(2, rows, 2, dtype=torch.float32)
        (weight, bias), (second_weight, second_bias) = norms[0], norms[-1]
        with torch.cuda.device_of(m):
            pair_input_kernel[(2 * rows,)](
                m, e, weight if constant is None else constant, weight, bias, second_weight,
                second_bias, normed[0], normed[-1], span, statistics, rows, span.shape[1],
                layer.eps, D=size, HAS_CONSTANT=constant is not None,
                CENTRED=isinstance(layer, NeoXLayer), SECOND=len(norms) == 2,
                **launch_of_rows(size),
            )  # fmt: skip
        qkv = F.linear(normed[0], layer.qkv, layer.qkv_bias)
        a = span.new_empty(rows, heads, length, dtype=torch.float32)
        b, u = torch.empty_like(a), a.new_empty(rows, front, heads, length)
        values = span.new_empty(0 if front else 2, rows, heads, layer.head_size)
        apart = span.new_empty(2 if front else 1, rows, heads, layer.head_size)
        with torch.cuda.device_of(m):
            pair_logits_kernel[(rows, heads)](
                qkv, *_of_heads(layer, qkv), cos, sin, a, b, u if front else a,
                apart if front else values, apart, rows, heads, layer.kv_heads, length,
                cos.stride(0), layer.scaling, layer.eps, WIDE=qkv.dtype == torch.float32,
                **_launch_of_heads(layer, cos),
            )  # fmt: skip
        bases = span[:, :2].transpose(0, 1)  # (2, B, d)
        if not front:
            bases.baddbmm_(values.flatten(2), _pair(layer.o.T))
        z = None
        if is_parallel(layer):
            up, up_bias = inner_projection(layer)
            z = F.linear(normed[1], up)
            inner = inner_activation(z, up_bias, layer, backend)
            bases.baddbmm_(inner, _pair(layer.down.T))
        o = layer.o.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (H, c, d)
        for k, kind in enumerate(apart):
            torch.bmm(kind.transpose(0, 1), o, out=_of_kind(span, k, heads))
        if len(fixed):
            span[:, own:] = fixed
        ctx.layer, ctx.backend = layer, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(m, e, statistics, qkv, z, cos, sin)
        return (a, b, u, span) if front else (a, b, span)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        m, e, statistics, qkv, z, cos, sin = ctx.saved_tensors
        grad_a, grad_b, *grad_u, grad_span = (grad.contiguous() for grad in grads)
        (rows, size), heads, front = m.shape, layer.heads, layer.prefix_length
        norms = _norms(layer)
        bases = grad_span[:, :2].transpose(0, 1)
        o = layer.o.unflatten(1, (heads, -1)).permute(1, 0, 2)  # (H, d, c)
        kinds = [torch.bmm(_of_kind(grad_span, k, heads), o) for k in range(2 if front else 1)]
        apart = torch.stack([kind.transpose(0, 1) for kind in kinds])
        values = apart if front else torch.bmm(bases, _pair(layer.o))
        grad_qkv = torch.empty_like(qkv)
        with torch.cuda.device_of(m):
            pair_logits_backward_kernel[(rows, layer.kv_heads)](
                qkv, *_of_heads(layer, qkv), cos, sin, grad_a, grad_b, *(grad_u or [grad_a]),
                values, apart, grad_qkv, rows, layer.kv_heads, len(cos) - front, cos.stride(0),
                layer.scaling, layer.eps, SHARED=heads // layer.kv_heads,
                **_launch_of_heads(layer, cos),
            )  # fmt: skip
        grad_normed = [grad_qkv @ layer.qkv]
        if z is not None:
            weight, bias = inner_projection(layer)
            grad_inner = torch.bmm(bases, _pair(layer.down))
            grad_z = inner_activation_backward(grad_inner, z, bias, layer, ctx.backend)
            grad_normed.append(grad_z @ weight)
        grad_m, grad_e = torch.empty_like(m), torch.empty_like(e)
        with torch.cuda.device_of(m):
            pair_input_backward_kernel[(2 * rows,)](
                m, e, norms[0][0], norms[-1][0], statistics, grad_normed[0], grad_normed[-1],
                grad_span, grad_m, grad_e, rows, grad_span.shape[1], D=size,
                CENTRED=isinstance(layer, NeoXLayer), SECOND=len(norms) == 2,
                **launch_of_rows(size),
            )  # fmt: skip
        return grad_m, grad_e, None, None, None, None


def _of_kind(span: Tensor, kind: int, heads: int) -> Tensor:
    """Return the vectors of a kind, one a head, as (H, B, d)."""
    start = 2 + kind * heads
    return span[:, start : start + heads].transpose(0, 1)


def _of_heads(layer: DecoderLayer, other: Tensor) -> tuple[Tensor, ...]:
    """Norms of q and k and the prefix; `other` stands for what the layer has not."""
    parts = (layer.q_norm, layer.k_norm, layer.prefix)
    return tuple(other if part is None else part.contiguous() for part in parts)


def span_by_triton(
    e: Tensor,  # (B, d)
    m: Tensor,  # (B, d)
    layer: DecoderLayer,
    cos: Tensor,  # (P + N, r), row i for position i
    sin: Tensor,  # (P + N, r)
    backend: str,  # of the activation of a parallel block: "triton"
) -> tuple[Logits, Tensor]:
    """Return the logits between e and m and the spanning vectors (B, S, d); see first_layer.py.

    Raises ValueError for a layer in float64.
    """
    if layer.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in fp32; use 'torch' for float64 weights")
    a, b, *u, span = _Span.apply(m, e, layer, cos.float(), sin.float(), backend)
    return Logits(a, b, u[0] if u else None), span
