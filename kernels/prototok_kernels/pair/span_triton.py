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
from prototok_kernels.pair.scan import Logits


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
    mean = 0.0
    if CENTRED:
        mean = tl.sum(value, 0) / D
        value = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    unit = value * inverse
    value = unit * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + vector * D + column, value.to(dtype), mask=inside)
    if SECOND:
        value = unit * tl.load(second_weight + column, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            value += tl.load(second_bias + column, mask=inside, other=0.0).to(tl.float32)
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
    pull = tl.sum(g * centred, 0) / D * inverse * inverse
    value = g - centred * pull
    if CENTRED:
        value -= tl.sum(g, 0) / D
    value *= inverse
    at = (row * spanning + kind) * D + column
    value += tl.load(grad_span + at, mask=inside, other=0.0).to(tl.float32)
    value = value.to(grad_m.dtype.element_ty)
    tl.store(grad_m + row * D + column, value, mask=_of_kind_m(kind, column, D))
    tl.store(grad_e + row * D + column, value, mask=_of_kind_m(1 - kind, column, D))


@triton.jit
def _head(x, weight, eps, NORMED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
          BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):  # fmt: skip
    """Load a head as the two halves that turn and the rest, and normalise it where asked to.

    The last result is the inverse of its root mean square.
    """
    pair, rest = tl.arange(0, BLOCK_HALF), 2 * HALF + tl.arange(0, BLOCK_REST)
    low = tl.load(x + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    high = tl.load(x + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    still = tl.load(x + rest, mask=rest < SIZE, other=0.0).to(tl.float32)
    inverse = 1.0
    if NORMED:
        square = tl.sum(low * low, 0) + tl.sum(high * high, 0) + tl.sum(still * still, 0)
        inverse = 1.0 / tl.sqrt(square / SIZE + eps)
        low *= inverse * tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        high *= inverse * tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        still *= inverse * tl.load(weight + rest, mask=rest < SIZE, other=0.0).to(tl.float32)
    return low, high, still, inverse


@triton.jit
def _store_head_gradient(to, x, weight, inverse, low, high, still, NORMED: tl.constexpr,
                         SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
                         BLOCK_REST: tl.constexpr):  # fmt: skip
    """Carry the gradient of what `_head` gives back to what it loads from x, and store it."""
    pair, rest = tl.arange(0, BLOCK_HALF), 2 * HALF + tl.arange(0, BLOCK_REST)
    if NORMED:
        x1 = tl.load(x + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        x0 = tl.load(x + rest, mask=rest < SIZE, other=0.0).to(tl.float32)
        low *= tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        high *= tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        still *= tl.load(weight + rest, mask=rest < SIZE, other=0.0).to(tl.float32)
        pull = tl.sum(low * x1, 0) + tl.sum(high * x2, 0) + tl.sum(still * x0, 0)
        pull *= inverse * inverse / SIZE
        low = inverse * (low - pull * x1)
        high = inverse * (high - pull * x2)
        still = inverse * (still - pull * x0)
    dtype = to.dtype.element_ty
    tl.store(to + pair, low.to(dtype), mask=pair < HALF)
    tl.store(to + HALF + pair, high.to(dtype), mask=pair < HALF)
    tl.store(to + rest, still.to(dtype), mask=rest < SIZE)


@triton.jit
def _table(cos, sin, position, table_row, inside, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Load the rows of the tables for some positions, (BN, BLOCK_HALF) each."""
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    at = position[:, None] * table_row + pair
    mask = inside[:, None] & (pair < HALF)
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)


@triton.jit
def _feature(q1, q2, q0, k1, k2, k0):
    """What ⟨R q, k⟩ has of the cosines and of the sines of q's position, and of neither."""
    return q1 * k1 + q2 * k2, q1 * k2 - q2 * k1, tl.sum(q0 * k0, 0)


@triton.jit
def _products(f1, f2, f0, c, s):
    """⟨R q, k⟩ by the positions of the rows of c and s."""
    return tl.sum(f1[None, :] * c + f2[None, :] * s, 1) + f0


@triton.jit
def _of_query(f1, f2, f0, k1, k2, k0):
    """Gradient of q, from that of its feature with k."""
    return f1 * k1 + f2 * k2, f1 * k2 - f2 * k1, f0 * k0


@triton.jit
def _of_key(f1, f2, f0, q1, q2, q0):
    """Gradient of k, from that of its feature with q."""
    return f1 * q1 - f2 * q2, f1 * q2 + f2 * q1, f0 * q0


@triton.jit
def _sums(grad, c, s):
    """Gradient of a feature from that of the products, of these positions."""
    return tl.sum(grad[:, None] * c, 0), tl.sum(grad[:, None] * s, 0), tl.sum(grad, 0)


@triton.jit
def pair_logits_kernel(
    qkv,  # (2, B, (H + 2 K)·c)
    q_norm,  # (c,); read only with NORMED
    k_norm,  # (c,)
    prefix,  # (2, K, P, c); read only with P
    cos,  # (P + N, ≥ r / 2) fp32
    sin,
    a,  # (B, H, N) fp32, out
    b,  # (B, H, N) fp32, out
    u,  # (B, P, H, N) fp32, out; written only with P
    values,  # (2, B, H, c), out without P
    apart,  # (1, B, H, c) out: of e from m; with P (2, B, H, c): of e and of m from the prefix
    rows,
    heads,
    kv_heads,
    length,
    table_row,
    scaling,
    eps,
    P: tl.constexpr,
    NORMED: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,  # r / 2
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # ≥ c
    BN: tl.constexpr,
):
    """Logits of scan.Logits by the distance of query and key, and the values apart from each other.

    One program a row and head. Keys are turned by row 0 of the tables rather than taken as they
    are, which keeps the attention factor of scaled tables (YaRN) right.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv = head // (heads // kv_heads)
    of_m = qkv + row * (heads + 2 * kv_heads) * SIZE
    of_e = of_m + rows.to(tl.int64) * (heads + 2 * kv_heads) * SIZE
    key, value = (heads + kv) * SIZE, (heads + kv_heads + kv) * SIZE
    q1, q2, q0, _ = _head(of_m + head * SIZE, q_norm, eps, NORMED, SIZE, HALF, BLOCK_HALF,
                          BLOCK_REST)  # fmt: skip
    m1, m2, m0, _ = _head(of_m + key, k_norm, eps, NORMED, SIZE, HALF, BLOCK_HALF, BLOCK_REST)
    e1, e2, e0, _ = _head(of_e + key, k_norm, eps, NORMED, SIZE, HALF, BLOCK_HALF, BLOCK_REST)
    pair = tl.arange(0, BLOCK_HALF)
    c0 = tl.load(cos + pair, mask=pair < HALF, other=0.0)
    s0 = tl.load(sin + pair, mask=pair < HALF, other=0.0)
    a1, a2, a0 = _feature(q1, q2, q0, m1 * c0 - m2 * s0, m2 * c0 + m1 * s0, m0)
    turned1, turned2 = e1 * c0 - e2 * s0, e2 * c0 + e1 * s0
    b1, b2, b0 = _feature(q1, q2, q0, turned1, turned2, e0)
    itself = 0.0
    if P > 0:
        p1, p2, p0, _ = _head(of_e + head * SIZE, q_norm, eps, NORMED, SIZE, HALF, BLOCK_HALF,
                              BLOCK_REST)  # fmt: skip
        f1, f2, f0 = _feature(p1, p2, p0, turned1, turned2, e0)
        itself = tl.sum(f1 * c0 + f2 * s0, 0) + f0
    tile = tl.arange(0, BN)
    out = (row * heads + head) * length
    start = 0
    while start < length:
        position = start + tile
        inside = position < length
        c, s = _table(cos, sin, position, table_row, inside, HALF, BLOCK_HALF)
        tl.store(a + out + position, _products(a1, a2, a0, c, s) * scaling, mask=inside)
        to_e = _products(b1, b2, b0, c, s)
        if P > 0:
            to_e = tl.where(position == 0, itself, to_e)
        tl.store(b + out + position, to_e * scaling, mask=inside)
        start += BN
    if P > 0:
        for j in range(P):
            at = prefix + (kv * P + j) * SIZE
            k1, k2, k0, _ = _head(at, k_norm, eps, False, SIZE, HALF, BLOCK_HALF, BLOCK_REST)
            f1, f2, f0 = _feature(q1, q2, q0, k1, k2, k0)
            g1, g2, g0 = _feature(p1, p2, p0, k1, k2, k0)
            out = ((row * P + j) * heads + head) * length
            start = 0
            while start < length:
                position = start + tile
                inside = position < length
                c, s = _table(cos, sin, P + position, table_row, inside, HALF, BLOCK_HALF)
                to_key = tl.where(
                    position == 0, _products(g1, g2, g0, c, s), _products(f1, f2, f0, c, s)
                )
                tl.store(u + out + position, to_key * scaling, mask=inside)
                start += BN

    column = tl.arange(0, BLOCK_SIZE)
    inside = column < SIZE
    v_m = tl.load(of_m + value + column, mask=inside, other=0.0)
    v_e = tl.load(of_e + value + column, mask=inside, other=0.0)
    to, half = (row * heads + head) * SIZE + column, rows.to(tl.int64) * heads * SIZE
    dtype = apart.dtype.element_ty
    if P == 0:
        tl.store(values + to, v_m, mask=inside)
        tl.store(values + half + to, v_e, mask=inside)
        tl.store(apart + to, (v_e.to(tl.float32) - v_m.to(tl.float32)).to(dtype), mask=inside)
    else:
        at = prefix + ((kv_heads + kv) * P) * SIZE + column
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(apart + to, (v_e.to(tl.float32) - first).to(dtype), mask=inside)
        tl.store(apart + half + to, (v_m.to(tl.float32) - first).to(dtype), mask=inside)


@triton.jit
def pair_logits_backward_kernel(
    qkv,  # (2, B, (H + 2 K)·c)
    q_norm,  # (c,); read only with NORMED
    k_norm,  # (c,)
    prefix,  # (2, K, P, c); read only with P
    cos,  # (P + N, ≥ r / 2) fp32
    sin,
    grad_a,  # (B, H, N) fp32
    grad_b,  # (B, H, N) fp32
    grad_u,  # (B, P, H, N) fp32; read only with P
    grad_values,  # (2, B, H, c); read only without P
    grad_apart,  # (1 or 2, B, H, c), as in pair_logits_kernel
    grad,  # (2, B, (H + 2 K)·c), out
    rows,
    kv_heads,
    length,
    table_row,
    scaling,
    eps,
    SHARED: tl.constexpr,  # H / K
    P: tl.constexpr,
    NORMED: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a row and key-value head, through the heads that share it in their order."""
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = kv_heads * SHARED
    wide = (heads + 2 * kv_heads) * SIZE
    m_at, e_at = row * wide, (rows.to(tl.int64) + row) * wide
    key, value = (heads + kv) * SIZE, (heads + kv_heads + kv) * SIZE
    m1, m2, m0, m_scale = _head(qkv + m_at + key, k_norm, eps, NORMED, SIZE, HALF, BLOCK_HALF,
                                BLOCK_REST)  # fmt: skip
    e1, e2, e0, e_scale = _head(qkv + e_at + key, k_norm, eps, NORMED, SIZE, HALF, BLOCK_HALF,
                                BLOCK_REST)  # fmt: skip
    pair = tl.arange(0, BLOCK_HALF)
    c0 = tl.load(cos + pair, mask=pair < HALF, other=0.0)
    s0 = tl.load(sin + pair, mask=pair < HALF, other=0.0)
    m1, m2 = m1 * c0 - m2 * s0, m2 * c0 + m1 * s0
    e1, e2 = e1 * c0 - e2 * s0, e2 * c0 + e1 * s0
    none, no_rest = tl.zeros([BLOCK_HALF], tl.float32), tl.zeros([BLOCK_REST], tl.float32)
    m_grad1, m_grad2, m_grad0 = none, none, no_rest  # of the turned keys
    e_grad1, e_grad2, e_grad0 = none, none, no_rest
    column = tl.arange(0, BLOCK_SIZE)
    inside_size = column < SIZE
    v_m = tl.zeros([BLOCK_SIZE], tl.float32)
    v_e = tl.zeros([BLOCK_SIZE], tl.float32)
    tile = tl.arange(0, BN)
    half = rows.to(tl.int64) * heads * SIZE
    for s in range(SHARED):
        head = kv * SHARED + s
        q1, q2, q0, q_scale = _head(qkv + m_at + head * SIZE, q_norm, eps, NORMED, SIZE, HALF,
                                    BLOCK_HALF, BLOCK_REST)  # fmt: skip
        a1, a2, a0 = none, none, 0.0
        b1, b2, b0 = none, none, 0.0
        at = (row * heads + head) * length
        start = 0
        while start < length:
            position = start + tile
            inside = position < length
            cosine, sine = _table(cos, sin, position, table_row, inside, HALF, BLOCK_HALF)
            g = tl.load(grad_a + at + position, mask=inside, other=0.0) * scaling
            x1, x2, of_rest = _sums(g, cosine, sine)
            a1 += x1
            a2 += x2
            a0 += of_rest
            later = inside & (position >= 1)
            g = tl.load(grad_b + at + position, mask=later, other=0.0) * scaling
            x1, x2, of_rest = _sums(g, cosine, sine)
            b1 += x1
            b2 += x2
            b0 += of_rest
            start += BN
        x1, x2, x0 = _of_query(a1, a2, a0, m1, m2, m0)
        y1, y2, y0 = _of_query(b1, b2, b0, e1, e2, e0)
        q_grad1, q_grad2, q_grad0 = x1 + y1, x2 + y2, x0 + y0
        x1, x2, x0 = _of_key(a1, a2, a0, q1, q2, q0)
        m_grad1 += x1
        m_grad2 += x2
        m_grad0 += x0
        x1, x2, x0 = _of_key(b1, b2, b0, q1, q2, q0)
        e_grad1 += x1
        e_grad2 += x2
        e_grad0 += x0
        p_grad1, p_grad2, p_grad0 = none, none, no_rest
        p_scale = 1.0
        if P > 0:  # e asks as well: of itself, and of the prefix
            p1, p2, p0, p_scale = _head(qkv + e_at + head * SIZE, q_norm, eps, NORMED, SIZE, HALF,
                                        BLOCK_HALF, BLOCK_REST)  # fmt: skip
            g = tl.load(grad_b + at) * scaling
            p_grad1, p_grad2, p_grad0 = _of_query(g * c0, g * s0, g, e1, e2, e0)
            x1, x2, x0 = _of_key(g * c0, g * s0, g, p1, p2, p0)
            e_grad1 += x1
            e_grad2 += x2
            e_grad0 += x0
            c_e = tl.load(cos + P * table_row + pair, mask=pair < HALF, other=0.0)
            s_e = tl.load(sin + P * table_row + pair, mask=pair < HALF, other=0.0)
            for j in range(P):
                k1, k2, k0, _ = _head(prefix + (kv * P + j) * SIZE, k_norm, eps, False, SIZE, HALF,
                                      BLOCK_HALF, BLOCK_REST)  # fmt: skip
                at = ((row * P + j) * heads + head) * length
                g = tl.load(grad_u + at) * scaling
                x1, x2, x0 = _of_query(g * c_e, g * s_e, g, k1, k2, k0)
                p_grad1 += x1
                p_grad2 += x2
                p_grad0 += x0
                f1, f2, f0 = none, none, 0.0
                start = 0
                while start < length:
                    position = start + tile
                    later = (position < length) & (position >= 1)
                    cosine, sine = _table(
                        cos, sin, P + position, table_row, later, HALF, BLOCK_HALF
                    )
                    g = tl.load(grad_u + at + position, mask=later, other=0.0) * scaling
                    y1, y2, of_rest = _sums(g, cosine, sine)
                    f1 += y1
                    f2 += y2
                    f0 += of_rest
                    start += BN
                x1, x2, x0 = _of_query(f1, f2, f0, k1, k2, k0)
                q_grad1 += x1
                q_grad2 += x2
                q_grad0 += x0
        query = head * SIZE
        _store_head_gradient(
            grad + m_at + query, qkv + m_at + query, q_norm, q_scale, q_grad1, q_grad2, q_grad0,
            NORMED, SIZE, HALF, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        _store_head_gradient(
            grad + e_at + query, qkv + e_at + query, q_norm, p_scale, p_grad1, p_grad2, p_grad0,
            NORMED and P > 0, SIZE, HALF, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        to = (row * heads + head) * SIZE + column
        of_e = tl.load(grad_apart + to, mask=inside_size, other=0.0).to(tl.float32)
        if P == 0:
            v_m -= of_e
            v_m += tl.load(grad_values + to, mask=inside_size, other=0.0).to(tl.float32)
            v_e += tl.load(grad_values + half + to, mask=inside_size, other=0.0).to(tl.float32)
        else:
            v_m += tl.load(grad_apart + half + to, mask=inside_size, other=0.0).to(tl.float32)
        v_e += of_e
    _store_head_gradient(
        grad + m_at + key, qkv + m_at + key, k_norm, m_scale,
        m_grad1 * c0 + m_grad2 * s0, m_grad2 * c0 - m_grad1 * s0, m_grad0,
        NORMED, SIZE, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _store_head_gradient(
        grad + e_at + key, qkv + e_at + key, k_norm, e_scale,
        e_grad1 * c0 + e_grad2 * s0, e_grad2 * c0 - e_grad1 * s0, e_grad0,
        NORMED, SIZE, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    dtype = grad.dtype.element_ty
    tl.store(grad + m_at + value + column, v_m.to(dtype), mask=inside_size)
    tl.store(grad + e_at + value + column, v_e.to(dtype), mask=inside_size)


def _norms(layer: DecoderLayer) -> list[tuple[Tensor, Tensor]]:
    """List weight and bias of the norms of e and m; the weight stands for a bias that is not."""
    if not isinstance(layer, NeoXLayer):
        return [(layer.input_norm, layer.input_norm)]
    both = [(layer.input_norm, layer.input_norm_bias), (layer.post_norm, layer.post_norm_bias)]
    return both if layer.parallel else both[:1]


def _launch_of_rows(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    # Triton's own default of the last differs from version to version.
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), "enable_fp_fusion": True}


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
                **_launch_of_rows(size),
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
                cos.stride(0), layer.scaling, layer.eps, **_launch_of_heads(layer, cos),
            )  # fmt: skip
        bases = span[:, :2].transpose(0, 1)  # (2, B, d)
        if not front:
            bases.baddbmm_(values.flatten(2), _pair(layer.o.T))
        z = None
        if is_parallel(layer):
            weight, bias = inner_projection(layer)
            z = F.linear(normed[1], weight)
            inner = inner_activation(z, bias, layer, backend)
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
                **_launch_of_rows(size),
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
