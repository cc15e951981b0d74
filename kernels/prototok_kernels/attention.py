"""Rotary positions and causal self-attention, from the stacked product of q, k and v.

On the CPU one C++ pass; on CUDA one Triton launch each way for short texts (attention_triton.py), a
rotation in place and torch's attention (cuDNN, Flash) on views for others.

Letters: B rows, N positions, H heads, K key-value heads, c head size, r rotary size (r ≤ c), P
constant positions in front of all rows (prefix.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prototok_kernels.attention_triton import TileAttention, why_no_tile
from prototok_kernels.backend import _cpu, require
from prototok_kernels.views import views

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _rotary_kernel(  # type: ignore[no-untyped-def]
        x,  # (B, N, heads, c), read
        out,  # (B, N, heads, c), may be x
        cos,  # (≥ N, ≥ r / 2) fp32
        sin,
        x_row,
        x_position,
        x_head,
        out_position,  # elements from one position to the next; rows follow without a gap
        out_head,
        table_row,
        length,
        heads,
        DIRECTION: tl.constexpr,  # 1, or −1 to turn back
        SIZE: tl.constexpr,
        HALF: tl.constexpr,  # r / 2
        BLOCK_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
        BLOCK_REST: tl.constexpr,
        COPY_REST: tl.constexpr,  # out is not x, and r < c
    ):
        row = tl.program_id(0).to(tl.int64)
        position = row % length
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        pair = tl.arange(0, BLOCK_HALF)
        c = tl.load(cos + position * table_row + pair, mask=pair < HALF, other=0.0)[None, :]
        s = tl.load(sin + position * table_row + pair, mask=pair < HALF, other=0.0)[None, :]
        s = s * DIRECTION
        x += (row // length) * x_row + position * x_position + head[:, None] * x_head
        out += row * out_position + head[:, None] * out_head
        inside = (head[:, None] < heads) & (pair[None, :] < HALF)
        low = tl.load(x + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.load(x + HALF + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        dtype = out.dtype.element_ty
        tl.store(out + pair[None, :], (low * c - high * s).to(dtype), mask=inside)
        tl.store(out + HALF + pair[None, :], (high * c + low * s).to(dtype), mask=inside)
        if COPY_REST:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            inside = (head[:, None] < heads) & (rest < SIZE)
            tl.store(out + rest, tl.load(x + rest, mask=inside, other=0.0), mask=inside)


def _rotate(
    x: Tensor,  # (B, N, heads, c), the last dimension contiguous
    out: Tensor,  # the same, rows without a gap between them; may be x
    cos: Tensor,
    sin: Tensor,
    direction: int,
) -> None:
    rows, length, heads, size = x.shape
    half = cos.shape[-1] // 2
    if rows * length == 0:
        return
    block_half = triton.next_power_of_2(half)
    block_heads = min(triton.next_power_of_2(heads), max(1, 1024 // block_half))
    with torch.cuda.device_of(x):
        _rotary_kernel[(rows * length, triton.cdiv(heads, block_heads))](
            x, out, cos, sin, x.stride(0), x.stride(1), x.stride(2), out.stride(1), out.stride(2),
            cos.stride(0), length, heads,
            DIRECTION=direction, SIZE=size, HALF=half, BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half, BLOCK_REST=triton.next_power_of_2(max(1, size - 2 * half)),
            COPY_REST=out is not x and 2 * half < size,
        )  # fmt: skip


def _heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, N, H, c), k and v (B, N, K, c) as views of the stack (B, N, (H + 2 K)·c)."""
    size = qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = qkv.unflatten(-1, (-1, size)).split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v


class _RotaryInPlace(torch.autograd.Function):
    """The stacked product → rotated q and k, and v, all views of it; it is overwritten."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        stack = qkv.detach()
        size = qkv.shape[-1] // (heads + 2 * kv_heads)
        turned = stack.unflatten(-1, (-1, size))[:, :, : heads + kv_heads]
        _rotate(turned, turned, cos, sin, 1)
        ctx.save_for_backward(cos, sin)
        ctx.heads = (heads, kv_heads, size)
        return _heads(stack, heads, kv_heads)

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, kv_heads, size = ctx.heads
        rows, length = grad_q.shape[:2]
        grad = grad_q.new_empty(rows, length, (heads + 2 * kv_heads) * size)
        to_q, to_k, to_v = _heads(grad, heads, kv_heads)
        for source, to in ((grad_q, to_q), (grad_k, to_k)):
            source = source if source.stride(-1) == 1 else source.contiguous()
            _rotate(source, to, cos, sin, -1)
        to_v.copy_(grad_v)
        return grad, None, None, None, None


def _cpu_pass(
    qkv: Tensor,  # (B, N, (H + 2 K)·c), contiguous
    grad: Tensor | None,  # (B, N, H·c); None: forward
    cos: Tensor,
    sin: Tensor,
    prefix: Tensor | None,  # (2, K, P, c)
    shape: tuple[int, ...],  # N, H, K, c, r, window
    scaling: float,
) -> Tensor:
    _, heads, kv_heads, size, _, window = shape
    out = qkv.new_empty(*qkv.shape[:2], heads * size) if grad is None else torch.empty_like(qkv)
    if out.numel() == 0:
        return out
    if grad is not None:
        grad = grad.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    _cpu.attention(
        **views(qkv=qkv, grad_out=grad, out=out, cos=cos, sin=sin, prefix=prefix), heads=heads,
        kv_heads=kv_heads, window=window, scaling=scaling, threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, prefix: Tensor | None,
        shape: tuple[int, ...], scaling: float,
    ) -> Tensor:  # fmt: skip
        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv, cos, sin, prefix)
        ctx.shape, ctx.scaling = shape, scaling
        return _cpu_pass(qkv, None, cos, sin, prefix, shape, scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, prefix = ctx.saved_tensors
        grad_qkv = _cpu_pass(qkv, grad, cos, sin, prefix, ctx.shape, ctx.scaling)
        return grad_qkv, None, None, None, None, None


def causal_attention(
    q: Tensor,  # (B, H, N, c)
    k: Tensor,  # (B, K, N, c)
    v: Tensor,  # (B, K, N, c)
    scaling: float,
    window: int | None = None,
    flash: bool = False,
    prefix: Tensor | None = None,  # (2, K, P, c), keys and values
) -> Tensor:  # (B, N, H·c)
    """Attend causally by torch or flash-attn, within a window where one is given; merge heads."""
    mask, dtype = None, v.dtype
    if q.numel() == 0:  # of which torch makes None on CUDA
        return (q + 0 * (k.sum() + v.sum())).transpose(1, 2).flatten(2)
    if prefix is not None:
        k, v = (
            torch.cat([front.expand(len(q), -1, -1, -1), own], dim=2)
            for front, own in zip(prefix, (k, v), strict=True)
        )
    if flash:
        from flash_attn import flash_attn_func

        seen = (-1, -1) if window is None else (window - 1, 0)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # Where keys are more than queries it takes the queries for the last positions.
        out = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, window_size=seen)
        return out.flatten(2)
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        # Torch's bf16 attention backward on the CPU is an order of magnitude slower than its fp32
        # one; casting costs a fraction of the difference (docs/dev/log.md has the figures).
        q, k, v = q.float(), k.float(), v.float()
    length, keys = q.shape[2], k.shape[2]
    if keys > length or (window is not None and window < length):
        position = torch.arange(keys, device=q.device)
        distance = position[keys - length :, None] - position[None, :]
        mask = (distance >= 0) & (distance < (window or keys))
    kernels: AbstractContextManager[object] = nullcontext()
    if mask is not None and cudnn_may_fail(keys, q.device):
        kernels = without_cudnn()
        # Of the others not all that take a mask share the heads of k and v, in every version.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    with kernels:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return out.transpose(1, 2).flatten(2).to(dtype)


def cudnn_may_fail(keys: int, device: torch.device) -> bool:
    """Return True if the gradient of cuDNN's attention under a mask may be NaN for so many keys.

    It takes 64 keys too many for logits of 0, where those of a row may all lie so far below that
    their exponentials overflow (torch 2.11 to 2.13 on Hopper, pytorch issue 196678).
    """
    return device.type != "cpu" and keys % 128 == 64


def without_cudnn() -> AbstractContextManager[object]:
    """Let torch attend by its other kernels inside."""
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def rotary(
    x: Tensor,  # (…, N, c)
    cos: Tensor,  # (N, r)
    sin: Tensor,  # (N, r)
) -> Tensor:
    """Rotate the first r coordinates of each head (the two halves of r form the pairs)."""
    r = cos.shape[-1]
    rotated = x if r == x.shape[-1] else x[..., :r]
    low, high = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat([-high, low], dim=-1) * sin
    return turned if r == x.shape[-1] else torch.cat([turned, x[..., r:]], dim=-1)


def attention(
    qkv: Tensor,  # (B, N, (H + 2 K)·c): all of q, then k, then v; not rotated
    cos: Tensor,  # (≥ N, r), the halves of a row alike
    sin: Tensor,  # (≥ N, r)
    *,
    heads: int,
    kv_heads: int,
    scaling: float,
    window: int | None = None,
    flash: bool = False,
    prefix: Tensor | None = None,  # (2, K, P, c), keys, rotated, and values
    backend: str,  # "torch", "triton" or "cpu"
) -> Tensor:  # (B, N, H·c)
    """Compute causal self-attention with rotary positions, differentiable in qkv.

    A query sees `window` positions, its own included, or all before it (None). Heads of q that
    share a key-value head read it in place. "cpu" computes in fp32 and keeps nothing but qkv; so
    does "triton" where a tile holds the text (`attention_triton.why_no_tile`). Where none does, or
    with `flash`, q and k are rotated in place, so that **qkv is overwritten**, and torch attends,
    or the flash-attn package, which must be there; "cpu" has no use for it.

    Behind a prefix every query sees its P positions as well, within the window; then cos and sin
    begin with position P. No gradient goes to the prefix.

    Raises ValueError for a shape, dtype or backend that cannot be met.
    """
    require(backend, qkv)
    _check(qkv, cos, sin, heads, kv_heads, window)
    _check_prefix(prefix, qkv, heads, kv_heads)
    if flash and backend == "cpu":
        raise ValueError("flash: backend 'cpu' attends by itself")
    if backend == "torch":
        return attention_ref(
            qkv, cos, sin, heads=heads, kv_heads=kv_heads, scaling=scaling, window=window,
            flash=flash, prefix=prefix,
        )  # fmt: skip
    length = qkv.shape[1]
    cos, sin = cos.float(), sin.float()
    size = qkv.shape[2] // (heads + 2 * kv_heads)
    if backend == "triton":
        qkv = qkv.contiguous()
        keys = length if prefix is None else prefix.shape[2] + length
        shared = heads != kv_heads
        if not flash and why_no_tile(keys, size, qkv.dtype, shared, qkv.device) is None:
            prefix = None if prefix is None else prefix.contiguous()
            return TileAttention.apply(qkv, cos, sin, prefix, heads, kv_heads, scaling, window)
        q, k, v = _RotaryInPlace.apply(qkv, cos, sin, heads, kv_heads)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return causal_attention(q, k, v, scaling, window, flash, prefix)
    prefix = None if prefix is None else prefix.contiguous()
    keys = length if prefix is None else prefix.shape[2] + length
    # Beyond the keys a window hides nothing.
    seen = keys if window is None else min(window, keys)
    shape = (length, heads, kv_heads, size, cos.shape[1], max(1, seen))
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _CpuAttention.apply(qkv, cos, sin, prefix, shape, scaling)
    return _cpu_pass(qkv.contiguous(), None, cos, sin, prefix, shape, scaling)


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, window: int | None
) -> None:
    width = qkv.shape[-1]
    if qkv.ndim != 3 or heads % kv_heads or width % (heads + 2 * kv_heads):
        raise ValueError(
            f"qkv: must be (B, N, (H + 2 K) · c) for {heads} heads and {kv_heads} key-value heads, "
            f"saw {tuple(qkv.shape)}"
        )
    size, length = width // (heads + 2 * kv_heads), qkv.shape[1]
    if cos.shape != sin.shape or len(cos) < length or cos.shape[1] > size or cos.shape[1] % 2:
        raise ValueError(
            f"cos: must be (≥ {length}, r) with even r ≤ {size}, like sin; saw {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        raise ValueError(f"cos: must have contiguous rows that lie as sin's do, saw {cos.stride()}")
    if window is not None and window < 1:
        raise ValueError(f"window: must be at least 1 position, saw {window}")


def _check_prefix(prefix: Tensor | None, qkv: Tensor, heads: int, kv_heads: int) -> None:
    if prefix is None:
        return
    size, shape = qkv.shape[-1] // (heads + 2 * kv_heads), tuple(prefix.shape)
    if prefix.dtype != qkv.dtype or shape != (2, kv_heads, *shape[2:3], size):
        raise ValueError(
            f"prefix: must be {qkv.dtype} (2, {kv_heads}, P, {size}), saw {prefix.dtype} {shape}"
        )


def attention_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    scaling: float,
    window: int | None = None,
    flash: bool = False,
    prefix: Tensor | None = None,
) -> Tensor:
    """Compute the same in plain torch."""
    length = qkv.shape[1]
    q, k, v = (t.transpose(1, 2) for t in _heads(qkv, heads, kv_heads))
    cos, sin = cos[:length].to(qkv.dtype), sin[:length].to(qkv.dtype)
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    return causal_attention(q, k, v, scaling, window, flash, prefix)
