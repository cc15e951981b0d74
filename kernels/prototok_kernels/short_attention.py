"""Rotary and causal attention of short sequences on the CPU, as batched products.

Torch's attention on the CPU is made for long sequences: at up to some 128 positions a full matrix
of weights in fp32 and six batched products are faster, the backward pass above all (docs/log.md).

Letters: B rows, N positions, H heads, K key-value heads, c head size, r rotary size (r ≤ c).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 128  # positions up to which this is the faster way


def _turn_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r coordinates of each head in place; cos and sin are (N, r / 2)."""
    half = cos.shape[-1]
    low, high = x[..., :half], x[..., half : 2 * half]
    crossed = low * sin
    low.mul_(cos).addcmul_(high, sin, value=-1)
    high.mul_(cos).add_(crossed)
    return x


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, heads, c) → (B, heads, N, c), a copy."""
    return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scaling: float
    ) -> Tensor:
        (rows, length, heads, size), kv_heads = q.shape, k.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        # Both halves of a table are the same.
        cos, sin = (t[:length, : t.shape[-1] // 2].to(dtype) for t in (cos, sin))
        # The queries that share a key head stand one above the other: (B·K, H / K · N, c).
        queries = _turn_(_by_head(q, dtype), cos, sin).mul_(scaling).view(rows * kv_heads, -1, size)
        keys = _turn_(_by_head(k, dtype), cos, sin).view(rows * kv_heads, length, size)
        values = _by_head(v, dtype).view(rows * kv_heads, length, size)
        later = cos.new_full((length, length), float("-inf")).triu(1)
        weights = torch.baddbmm(
            later.repeat(heads // kv_heads, 1), queries, keys.transpose(1, 2)
        )  # (B·K, H / K · N, N)
        torch.softmax(weights, -1, out=weights)
        ctx.scaling = scaling
        ctx.save_for_backward(queries, keys, values, weights, cos, sin)
        out = torch.bmm(weights, values).view(rows, heads, length, size)
        return out.transpose(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights, cos, sin = ctx.saved_tensors
        rows, length, heads, size = grad.shape
        dtype, out_dtype = queries.dtype, grad.dtype
        g = _by_head(grad, dtype).view_as(queries)
        grad_v = torch.bmm(weights.transpose(1, 2), g)
        grad_logits = torch._softmax_backward_data(
            torch.bmm(g, values.transpose(1, 2)), weights, -1, dtype
        )
        grad_q = torch.bmm(grad_logits, keys).mul_(ctx.scaling).view(rows, heads, length, size)
        grad_k = torch.bmm(grad_logits.transpose(1, 2), queries).view(rows, -1, length, size)
        grads = (
            _turn_(grad_q, cos, -sin), _turn_(grad_k, cos, -sin), grad_v.view_as(grad_k)
        )  # fmt: skip
        return *(t.transpose(1, 2).to(out_dtype) for t in grads), None, None, None


def short_attention(
    q: Tensor,  # (B, N, H, c), not rotated
    k: Tensor,  # (B, N, K, c), not rotated
    v: Tensor,  # (B, N, K, c)
    cos: Tensor,  # (≥ N, r)
    sin: Tensor,  # (≥ N, r)
    scaling: float,
) -> Tensor:  # (B, N, H, c)
    """Causal attention with rotary positions, differentiable in q, k and v; in fp32 or better.

    Its memory grows with B·H·N²: meant for N ≤ LONGEST.
    """
    out: Tensor = _ShortAttention.apply(q, k, v, cos, sin, scaling)
    return out
