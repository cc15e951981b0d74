"""Attention of up to 128 keys in two halves of 64, in one launch each way.

As in attention_triton.py a program takes all keys of a row and head. Queries of the first half see
none of the second, so that a quarter of the products falls away. Tiles of 64 × 64 fit the registers
of 128 threads, two programs fit a processor, and one of them computes while the other loads
(docs/dev/log.md, "On an H200").

A query's place is that of its key, so the first of P constant positions are queries too, of zeros,
whose results are not stored.

Letters: as in attention_triton.py; as many key-value heads as heads.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    from prototok_kernels.activation import _INTERPRETED, _exp2, _inverse
    from prototok_kernels.attention_tiles import (
        _angles,
        _keys_and_values,
        _load_pairs,
        _logits,
        _product,
        _store_turned_back,
        _turned,
        _weights,
    )
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _queries(
        qkv, cos, sin, j, head, length, table_row, HEADS: tl.constexpr, SIZE: tl.constexpr,
        HALF: tl.constexpr, PREFIX: tl.constexpr,
    ):  # fmt: skip
        """A tile of the queries at keys j, rotated; whether there are any, by key."""
        i = j - PREFIX
        own = (i >= 0) & (i < length)
        low, high = _load_pairs(qkv, i * (3 * HEADS * SIZE) + head * SIZE, own, HALF, SIZE // 2)
        c, s = _angles(cos, sin, table_row, i, own, HALF, SIZE // 2)
        return _turned(low, high, c, s), own

    @triton.jit
    def _mixed_at(x, j, head, own, HEADS: tl.constexpr, SIZE: tl.constexpr, PREFIX: tl.constexpr):
        """Where the queries at keys j have what they mixed, and the mask of it."""
        at = (j - PREFIX)[:, None] * (HEADS * SIZE) + head * SIZE + tl.arange(0, SIZE)[None, :]
        return x + at, own[:, None]

    @triton.jit
    def _again(j):
        """The same, unknown to the compiler, which would keep addresses until registers spill."""
        if _INTERPRETED:
            return j
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [j], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def _store_turned(
        tile, cos, sin, grad, j, length, table_row, STACK: tl.constexpr, SIZE: tl.constexpr,
        HALF: tl.constexpr, PREFIX: tl.constexpr,
    ):  # fmt: skip
        """Write the gradient of q or of k at keys j, from that of its tile."""
        i = _again(j) - PREFIX
        own = (i >= 0) & (i < length)
        c, s = _angles(cos, sin, table_row, i, own, HALF, SIZE // 2)
        _store_turned_back(tile, c, s, grad, i * STACK, own, HALF, SIZE // 2)

    @triton.jit
    def _store_values(
        tile, grad, j, length, STACK: tl.constexpr, SIZE: tl.constexpr, PREFIX: tl.constexpr
    ):
        """Write the gradient of v at keys j."""
        i = _again(j) - PREFIX
        to = grad + (i * STACK)[:, None] + tl.arange(0, SIZE)[None, :]
        tl.store(to, tile.to(grad.dtype.element_ty), mask=((i >= 0) & (i < length))[:, None])

    @triton.jit
    def _attention_halves_kernel(
        qkv,  # (B, N, 3 H c)
        cos,  # (≥ N, ≥ r / 2) fp32
        sin,
        prefix,  # (2, H, P, c), keys, rotated, and values; read only with PREFIX
        out,  # (B, N, H c)
        scale,  # of logits, and log2 e
        length,  # N
        table_row,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,  # as many
        SIZE: tl.constexpr,  # c
        HALF: tl.constexpr,  # r / 2
        PREFIX: tl.constexpr,  # P
        WINDOW: tl.constexpr,  # positions a query sees, its own included; 0: all
        BLOCK_K: tl.constexpr,  # of both halves; T is more than one
        WIDE: tl.constexpr,  # products of fp32, for the interpreter, which has none of bf16
    ):
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        qkv += row * length * (3 * HEADS * SIZE)
        out += row * length * (HEADS * SIZE)
        near = tl.arange(0, BLOCK_K // 2)
        far = near + BLOCK_K // 2
        k, v = _keys_and_values(
            qkv, cos, sin, prefix, head, length, table_row, near, HEADS, HEADS, SIZE, HALF, PREFIX
        )
        far_k, far_v = _keys_and_values(
            qkv, cos, sin, prefix, head, length, table_row, far, HEADS, HEADS, SIZE, HALF, PREFIX
        )
        q, own = _queries(
            qkv, cos, sin, far, head, length, table_row, HEADS, SIZE, HALF, PREFIX
        )  # fmt: skip
        logits = _logits(q, k, far, near, scale, True, WINDOW, WIDE)
        far_logits = _logits(q, far_k, far, far, scale, False, WINDOW, WIDE)
        top = tl.maximum(tl.max(logits, 1), tl.max(far_logits, 1))[:, None]
        weights, far_weights = _exp2(logits - top), _exp2(far_logits - top)
        total = tl.sum(weights, 1) + tl.sum(far_weights, 1)
        mixed = _product(weights.to(v.dtype), v, WIDE)
        mixed += _product(far_weights.to(v.dtype), far_v, WIDE)
        mixed = (mixed * _inverse(total)[:, None]).to(v.dtype)
        to, mask = _mixed_at(out, far, head, own, HEADS, SIZE, PREFIX)
        tl.store(to, mixed, mask=mask)

        q, own = _queries(
            qkv, cos, sin, near, head, length, table_row, HEADS, SIZE, HALF, PREFIX
        )  # fmt: skip
        weights, total = _weights(q, k, near, near, scale, WINDOW, WIDE)
        mixed = (_product(weights.to(v.dtype), v, WIDE) * _inverse(total)).to(v.dtype)
        to, mask = _mixed_at(out, near, head, own, HEADS, SIZE, PREFIX)
        tl.store(to, mixed, mask=mask)

    @triton.jit
    def _attention_halves_backward_kernel(
        qkv,  # (B, N, 3 H c)
        cos,
        sin,
        prefix,
        grad_out,  # (B, N, H c)
        grad,  # as qkv
        scaling,  # of logits
        scale,  # and log2 e
        length,
        table_row,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        SIZE: tl.constexpr,
        HALF: tl.constexpr,
        PREFIX: tl.constexpr,
        WINDOW: tl.constexpr,
        BLOCK_K: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        STACK: tl.constexpr = 3 * HEADS * SIZE
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        qkv += row * length * STACK
        grad_out += row * length * (HEADS * SIZE)
        of_queries = grad + row * length * STACK + head * SIZE
        of_keys = of_queries + HEADS * SIZE
        of_values = of_keys + HEADS * SIZE
        near = tl.arange(0, BLOCK_K // 2)
        far = near + BLOCK_K // 2
        k, v = _keys_and_values(
            qkv, cos, sin, prefix, head, length, table_row, near, HEADS, HEADS, SIZE, HALF, PREFIX
        )
        far_k, far_v = _keys_and_values(
            qkv, cos, sin, prefix, head, length, table_row, far, HEADS, HEADS, SIZE, HALF, PREFIX
        )
        # From their mean, as in attention_triton.py.
        total = tl.sum(k.to(tl.float32), 0) + tl.sum(far_k.to(tl.float32), 0)
        mean = (total / (PREFIX + length))[None, :]
        apart = (k.to(tl.float32) - mean).to(v.dtype)
        far_apart = (far_k.to(tl.float32) - mean).to(v.dtype)

        q, own = _queries(
            qkv, cos, sin, far, head, length, table_row, HEADS, SIZE, HALF, PREFIX
        )  # fmt: skip
        at, mask = _mixed_at(grad_out, far, head, own, HEADS, SIZE, PREFIX)
        grad_mixed = tl.load(at, mask=mask, other=0.0)
        logits = _logits(q, k, far, near, scale, True, WINDOW, WIDE)
        far_logits = _logits(q, far_k, far, far, scale, False, WINDOW, WIDE)
        top = tl.maximum(tl.max(logits, 1), tl.max(far_logits, 1))[:, None]
        weights, far_weights = _exp2(logits - top), _exp2(far_logits - top)
        scaled = _inverse(tl.sum(weights, 1) + tl.sum(far_weights, 1))[:, None]
        weights *= scaled
        far_weights *= scaled
        # What is finished is stored at once, for want of registers.
        far_grad_v = _product(tl.trans(far_weights.to(v.dtype)), grad_mixed, WIDE)
        _store_values(far_grad_v, of_values, far, length, STACK, SIZE, PREFIX)
        grad_v = _product(tl.trans(weights.to(v.dtype)), grad_mixed, WIDE)
        grads = _product(grad_mixed, tl.trans(v), WIDE)
        far_grads = _product(grad_mixed, tl.trans(far_v), WIDE)
        mean_grad = (tl.sum(weights * grads, 1) + tl.sum(far_weights * far_grads, 1))[:, None]
        of_logits = (weights * (grads - mean_grad) * scaling).to(v.dtype)
        of_far_logits = (far_weights * (far_grads - mean_grad) * scaling).to(v.dtype)
        grad_q = _product(of_far_logits, far_apart, WIDE) + _product(of_logits, apart, WIDE)
        _store_turned(
            grad_q, cos, sin, of_queries, far, length, table_row, STACK, SIZE, HALF, PREFIX
        )  # fmt: skip
        far_grad_k = _product(tl.trans(of_far_logits), q, WIDE)
        _store_turned(
            far_grad_k, cos, sin, of_keys, far, length, table_row, STACK, SIZE, HALF, PREFIX
        )  # fmt: skip
        grad_k = _product(tl.trans(of_logits), q, WIDE)

        near = _again(near)
        q, own = _queries(
            qkv, cos, sin, near, head, length, table_row, HEADS, SIZE, HALF, PREFIX
        )  # fmt: skip
        at, mask = _mixed_at(grad_out, near, head, own, HEADS, SIZE, PREFIX)
        grad_mixed = tl.load(at, mask=mask, other=0.0)
        weights, total = _weights(q, k, near, near, scale, WINDOW, WIDE)
        weights *= _inverse(total)
        grad_v += _product(tl.trans(weights.to(v.dtype)), grad_mixed, WIDE)
        _store_values(grad_v, of_values, near, length, STACK, SIZE, PREFIX)
        grads = _product(grad_mixed, tl.trans(v), WIDE)
        mean_grad = tl.sum(weights * grads, 1)[:, None]
        of_logits = (weights * (grads - mean_grad) * scaling).to(v.dtype)
        grad_k += _product(tl.trans(of_logits), q, WIDE)
        _store_turned(
            grad_k, cos, sin, of_keys, near, length, table_row, STACK, SIZE, HALF, PREFIX
        )  # fmt: skip
        grad_q = _product(of_logits, apart, WIDE)
        _store_turned(
            grad_q, cos, sin, of_queries, near, length, table_row, STACK, SIZE, HALF, PREFIX
        )  # fmt: skip
