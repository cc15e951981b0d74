"""Rotary positions and causal attention of short texts, in one launch each way.

A program holds all keys of a row and key-value head as one tile, those of a prefix in front. It
reads q, k and v where the stacked product left them, rotates them in registers, and backward writes
the gradient of the stack at once. Weights are computed again there, so that nothing but the stack
is kept.

More keys than a tile holds are taken in two halves (attention_halves.py).

Letters: B rows, N positions, H heads, K key-value heads, c head size, r rotary size (r ≤ c), P
constant positions in front, T = P + N keys.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prototok_kernels.backend import TRITON_INTERPRETED, capability

try:
    import triton
    import triton.language as tl

    from prototok_kernels.activation import _inverse
    from prototok_kernels.attention_halves import (
        _attention_halves_backward_kernel,
        _attention_halves_kernel,
    )
    from prototok_kernels.attention_tiles import (
        _angles,
        _keys_and_values,
        _load_pairs,
        _product,
        _store_turned_back,
        _turned,
        _weights,
    )
except ImportError:
    triton = None

# What compiles without spilling registers: T, c, and the queries of a turn backward. Forward all
# are one tile, as the keys are. Where tensor cores multiply for 128 threads at once (sm_90, sm_100)
# 128 keys do as two halves, for heads that share none.
_KEYS, _MORE_KEYS, _SIZE, _QUERIES = 64, 128, 64, 32
_LOG2_E = 1.4426950408889634


def why_no_tile(
    keys: int, head_size: int, dtype: torch.dtype, shared: bool, device: torch.device
) -> str | None:
    """Return why no tile holds T keys of heads of size c, or None where one does.

    shared: several heads of q share the keys.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return "a tile is of 16 bits"
    if head_size != _SIZE:
        return f"a tile has heads of {_SIZE}, not {head_size}"
    more = 90 <= capability(device) < 120 or device.type == "cpu"  # interpreted
    most = _MORE_KEYS if more and not shared else _KEYS
    if keys > most:
        return f"a tile has {most} keys here, not {keys}"
    return None


def _block(count: int) -> int:
    """Return the power of two that holds so many; a product of tensor cores has 16 each way."""
    return max(16, 1 << (count - 1).bit_length())


if triton is not None:

    @triton.jit
    def _attention_kernel(
        qkv,  # (B, N, (H + 2 K) c)
        cos,  # (≥ N, ≥ r / 2) fp32
        sin,
        prefix,  # (2, K, P, c), keys, rotated, and values; read only with PREFIX
        out,  # (B, N, H c)
        scale,  # of logits, and log2 e
        length,  # N
        table_row,
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        SIZE: tl.constexpr,  # c
        HALF: tl.constexpr,  # r / 2
        PREFIX: tl.constexpr,  # P
        WINDOW: tl.constexpr,  # positions a query sees, its own included; 0: all
        BLOCK_Q: tl.constexpr,  # ≥ N
        BLOCK_K: tl.constexpr,  # ≥ T
        WIDE: tl.constexpr,  # products of fp32, for the interpreter, which has none of bf16
    ):
        PAIRS: tl.constexpr = SIZE // 2
        STACK: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
        row = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        qkv += row * length * STACK
        out += row * length * (HEADS * SIZE) + head * SIZE
        j = tl.arange(0, BLOCK_K)
        k, v = _keys_and_values(
            qkv, cos, sin, prefix, head // (HEADS // KV_HEADS), length, table_row, j, HEADS,
            KV_HEADS, SIZE, HALF, PREFIX,
        )  # fmt: skip
        column = tl.arange(0, SIZE)[None, :]
        i = tl.arange(0, BLOCK_Q)
        low, high = _load_pairs(qkv, i * STACK + head * SIZE, i < length, HALF, PAIRS)
        c, s = _angles(cos, sin, table_row, i, i < length, HALF, PAIRS)
        q = _turned(low, high, c, s)
        weights, total = _weights(q, k, i + PREFIX, j, scale, WINDOW, WIDE)
        mixed = (_product(weights.to(v.dtype), v, WIDE) * _inverse(total)).to(v.dtype)
        to = out + i[:, None] * (HEADS * SIZE) + column
        tl.store(to, mixed, mask=i[:, None] < length)

    @triton.jit
    def _attention_backward_kernel(
        qkv,  # (B, N, (H + 2 K) c)
        cos,
        sin,
        prefix,
        grad_out,  # (B, N, H c)
        grad,  # as qkv
        scaling,  # of logits
        scale,  # and log2 e
        length,
        table_row,
        turns,  # heads that share the keys, times blocks of queries
        HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        SIZE: tl.constexpr,
        HALF: tl.constexpr,
        PREFIX: tl.constexpr,
        WINDOW: tl.constexpr,
        BLOCKS: tl.constexpr,  # of queries
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        PAIRS: tl.constexpr = SIZE // 2
        GROUP: tl.constexpr = HEADS // KV_HEADS
        STACK: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
        row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
        kv_head = tl.program_id(0) % KV_HEADS
        qkv += row * length * STACK
        grad += row * length * STACK
        grad_out += row * length * (HEADS * SIZE)
        j = tl.arange(0, BLOCK_K)
        k, v = _keys_and_values(
            qkv, cos, sin, prefix, kv_head, length, table_row, j, HEADS, KV_HEADS, SIZE, HALF,
            PREFIX,
        )  # fmt: skip
        # A query's gradients of logits sum to zero, so keys may be taken from their mean: where
        # they are alike and large, what rounding takes off the gradients would be seen.
        wide = k.to(tl.float32)
        apart = (wide - (tl.sum(wide, 0) / (PREFIX + length))[None, :]).to(v.dtype)
        column = tl.arange(0, SIZE)[None, :]
        grad_k = tl.zeros((BLOCK_K, SIZE), tl.float32)
        grad_v = tl.zeros((BLOCK_K, SIZE), tl.float32)
        step = 0
        # Not a loop of a known length, whose turns the compiler would mix until registers spill.
        while step < turns:
            head = kv_head * GROUP + step // BLOCKS
            i = step % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
            of_query = i * STACK + head * SIZE
            low, high = _load_pairs(qkv, of_query, i < length, HALF, PAIRS)
            c, s = _angles(cos, sin, table_row, i, i < length, HALF, PAIRS)
            q = _turned(low, high, c, s)
            at = i[:, None] * (HEADS * SIZE) + head * SIZE + column
            grad_mixed = tl.load(grad_out + at, mask=i[:, None] < length, other=0.0)
            weights, total = _weights(q, k, i + PREFIX, j, scale, WINDOW, WIDE)
            weights *= _inverse(total)
            grad_v += _product(tl.trans(weights.to(v.dtype)), grad_mixed, WIDE)
            grad_weights = _product(grad_mixed, tl.trans(v), WIDE)
            mean = tl.sum(weights * grad_weights, 1)[:, None]
            grad_logits = (weights * (grad_weights - mean) * scaling).to(v.dtype)
            grad_k += _product(tl.trans(grad_logits), q, WIDE)
            grad_q = _product(grad_logits, apart, WIDE)
            _store_turned_back(grad_q, c, s, grad, of_query, i < length, HALF, PAIRS)
            step += 1
        position = j - PREFIX
        own = (position >= 0) & (position < length)
        of_key = position * STACK + (HEADS + kv_head) * SIZE
        c, s = _angles(cos, sin, table_row, position, own, HALF, PAIRS)
        _store_turned_back(grad_k, c, s, grad, of_key, own, HALF, PAIRS)
        value = grad + of_key[:, None] + KV_HEADS * SIZE + column
        tl.store(value, grad_v.to(v.dtype), mask=own[:, None])


class TileAttention(torch.autograd.Function):
    """The stacked product → heads mixed, side by side; where `why_no_tile` says None."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, prefix: Tensor | None, heads: int,
        kv_heads: int, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(qkv, cos, sin, prefix)
        ctx.shape = heads, kv_heads, scaling, window
        rows, length, width = qkv.shape
        size = width // (heads + 2 * kv_heads)
        out = qkv.new_empty(rows, length, heads * size)
        if out.numel():
            constants = _constants(qkv, cos, prefix, heads, kv_heads, window)
            given = (
                qkv, cos, sin, qkv if prefix is None else prefix, out, scaling * _LOG2_E, length,
                cos.stride(0),
            )  # fmt: skip
            with torch.cuda.device_of(qkv):
                if constants["BLOCK_K"] > _KEYS:
                    _attention_halves_kernel[(rows * heads,)](*given, **constants)
                else:
                    _attention_kernel[(rows * heads,)](*given, BLOCK_Q=_block(length), **constants)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, prefix = ctx.saved_tensors
        heads, kv_heads, scaling, window = ctx.shape
        rows, length, _ = qkv.shape
        grad = torch.empty_like(qkv)
        if grad.numel():
            constants = _constants(qkv, cos, prefix, heads, kv_heads, window)
            given = (
                qkv, cos, sin, qkv if prefix is None else prefix, grad_out.contiguous(), grad,
                scaling, scaling * _LOG2_E, length, cos.stride(0),
            )  # fmt: skip
            with torch.cuda.device_of(qkv):
                if constants["BLOCK_K"] > _KEYS:
                    _attention_halves_backward_kernel[(rows * heads,)](*given, **constants)
                else:
                    queries = min(_QUERIES, _block(length))
                    blocks = triton.cdiv(length, queries)
                    _attention_backward_kernel[(rows * kv_heads,)](
                        *given,
                        heads // kv_heads * blocks,
                        BLOCKS=blocks,
                        BLOCK_Q=queries,
                        **constants,
                    )
        return grad, None, None, None, None, None, None, None


def _constants(
    qkv: Tensor, cos: Tensor, prefix: Tensor | None, heads: int, kv_heads: int, window: int | None
) -> dict[str, Any]:
    """Return what a kernel is compiled for, either way."""
    size = qkv.shape[2] // (heads + 2 * kv_heads)
    in_front = 0 if prefix is None else prefix.shape[2]
    keys = in_front + qkv.shape[1]
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "SIZE": size, "HALF": cos.shape[1] // 2,
        "PREFIX": in_front, "WINDOW": 0 if window is None or window >= keys else window,
        "BLOCK_K": _block(keys), "WIDE": TRITON_INTERPRETED, "num_stages": 1,
        "num_warps": 8 if keys <= _KEYS else 4,
    }  # fmt: skip
