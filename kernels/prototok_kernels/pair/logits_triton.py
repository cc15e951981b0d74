"""Triton kernels of the logits between e and m, behind a prefix or not, and of their gradient.

Beside span_triton.py, which launches them and takes their results on. Loops whose bound is known at
launch only are `while` loops: see first_layer_triton.py.

Letters: B rows, N positions, H heads, K key-value heads, c head size, r rotary size, P vectors of a
prefix. A pair is (2, B, …): of m, then of e.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


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
def _products(f1, f2, f0, c, s, WIDE: tl.constexpr):
    """⟨R q, k⟩ by the positions of the rows of c and s.

    WIDE is for fp32 weights: large logits that nearly cancel lose what fp32 sums round away.
    """
    if WIDE:
        f1, f2, c = f1.to(tl.float64), f2.to(tl.float64), c.to(tl.float64)
    return (tl.sum(f1[None, :] * c + f2[None, :] * s, 1) + f0).to(tl.float32)


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
    WIDE: tl.constexpr,
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
        tl.store(a + out + position, _products(a1, a2, a0, c, s, WIDE) * scaling, mask=inside)
        to_e = _products(b1, b2, b0, c, s, WIDE)
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
                    position == 0,
                    _products(g1, g2, g0, c, s, WIDE),
                    _products(f1, f2, f0, c, s, WIDE),
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
                    of_tile = tl.load(grad_u + at + position, mask=later, other=0.0) * scaling
                    y1, y2, of_rest = _sums(of_tile, cosine, sine)
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
