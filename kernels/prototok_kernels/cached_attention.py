"""Attention of one token a row to a cache of keys and values, which it joins: one launch.

The token's q and k are normed (Qwen3) and rotated, k and v written to the cache, and q attends to
what stands there and to the token itself. How far the cache is filled is a number on the device,
so that a CUDA graph serves every position. Where few programs would read a long cache, each
key-value head's positions are split among several, and a second launch merges what they found.

Letters: R rows, T positions of the cache, H heads, K key-value heads, G = H / K, c head size, r
rotary size (r ≤ c), S splits of T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.attention import rotary
from prototok_kernels.backend import early, require
from prototok_kernels.layers import DecoderLayer

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = None

# Positions of a cache that one program reads, more where that would be more than so many splits;
# and programs from which on a launch is not split: they fill the GPU already.
_SPLIT, _MOST_SPLITS, _ENOUGH = 512, 32, 128


@dataclass(frozen=True)
class Cache:
    """Keys and values of a layer's positions so far, and where the next token stands.

    keys, values  (R, K, T, c), each contiguous
    position      (R,) int64, the same in every row: positions that are taken, below T
    cos, sin      (≥ T, r) fp32, the halves of a row alike
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    cos: Tensor
    sin: Tensor


if triton is not None:

    @triton.jit
    def _turned(  # type: ignore[no-untyped-def]
        x, norm, head, column, mask, cos, sin, eps, SIZE: tl.constexpr, HALF: tl.constexpr,
        NORMED: tl.constexpr,
    ):  # fmt: skip
        """Heads of x (heads, c), normed where there is a norm, rotated, fp32."""
        # Each coordinate's partner in the rotation, and itself where there is none.
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        partner = tl.where(column < 2 * HALF, partner, column)
        rows = x + head[:, None] * SIZE
        own = tl.load(rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(rows + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            inverse = 1.0 / tl.sqrt(tl.sum(own * own, 1) / SIZE + eps)
            inside = column < SIZE
            weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
            of_partner = tl.load(norm + partner, mask=inside, other=0.0).to(tl.float32)
            own = own * inverse[:, None] * weight[None, :]
            other = other * inverse[:, None] * of_partner[None, :]
        other = tl.where(column[None, :] < HALF, -other, other)
        return own * cos[None, :] + other * sin[None, :]

    @triton.jit
    def _cached_attention_kernel(  # type: ignore[no-untyped-def]
        qkv,  # (R, (H + 2 K) c)
        keys,  # (R, K, T, c)
        values,
        position,  # (R,) int64
        cos,  # (≥ T, r) fp32
        sin,
        q_norm,  # (c,); read only with NORMED
        k_norm,
        out,  # (R, H c); with SPLITS > 1 (R, H, S, c) fp32, not yet divided by the sum
        best,  # (R, H, S) fp32, largest logit, and sum of exponentials; used only with SPLITS > 1
        total,
        scaling,
        eps,
        positions,  # T
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,  # G
        SIZE: tl.constexpr,  # c
        HALF: tl.constexpr,  # r / 2
        WINDOW: tl.constexpr,  # positions a query sees, its own included; 0: all
        NORMED: tl.constexpr,
        SPLITS: tl.constexpr,
        SPAN: tl.constexpr,  # positions of a split
        BLOCK_GROUP: tl.constexpr,  # ≥ G, and as many as a product of tensor cores has
        BLOCK: tl.constexpr,  # ≥ c
        BLOCK_T: tl.constexpr,
        PRECISION: tl.constexpr,  # of products, operands in fp32
        EARLY: tl.constexpr,
    ):
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
        kv_head = tl.program_id(0) % KV_HEADS
        split = tl.program_id(1)
        at = tl.load(position + row)
        column = tl.arange(0, BLOCK)
        member = tl.arange(0, BLOCK_GROUP)
        inside = column < SIZE
        turns = column < 2 * HALF
        c = tl.load(cos + at * 2 * HALF + column, mask=turns, other=1.0)
        s = tl.load(sin + at * 2 * HALF + column, mask=turns, other=0.0)
        qkv += row * (KV_HEADS * (GROUP + 2)) * SIZE
        mask = (member[:, None] < GROUP) & inside[None, :]
        head = kv_head * GROUP + member
        q = _turned(qkv, q_norm, head, column, mask, c, s, eps, SIZE, HALF, NORMED)
        dtype = keys.dtype.element_ty
        q = q.to(dtype).to(tl.float32)  # (G, c)

        keys += (row * KV_HEADS + kv_head) * positions * SIZE
        values += (row * KV_HEADS + kv_head) * positions * SIZE
        highest = tl.full((BLOCK_GROUP,), -3.4028234663852886e38, tl.float32)
        sums = tl.zeros((BLOCK_GROUP,), tl.float32)
        mixed = tl.zeros((BLOCK_GROUP, BLOCK), tl.float32)
        if split == 0:
            # The token itself, as the cache holds it. Nobody reads that place in this launch.
            one = KV_HEADS * GROUP + kv_head + tl.arange(0, 1)
            mine = inside[None, :]
            k = _turned(qkv, k_norm, one, column, mine, c, s, eps, SIZE, HALF, NORMED).to(dtype)
            of_value = qkv + (one + KV_HEADS)[:, None] * SIZE
            v = tl.load(of_value + column[None, :], mask=mine, other=0.0)
            tl.store(keys + at * SIZE + column[None, :], k, mask=mine)
            tl.store(values + at * SIZE + column[None, :], v, mask=mine)
            highest = tl.sum(q * k.to(tl.float32), 1) * scaling
            sums += 1.0
            mixed += v.to(tl.float32)
        start = split * SPAN
        for step in range(0, SPAN, BLOCK_T):
            t = start + step + tl.arange(0, BLOCK_T)
            seen = t < at
            if WINDOW > 0:
                seen = seen & (t > at - WINDOW)
            place = t[:, None] * SIZE + column[None, :]
            there = seen[:, None] & inside[None, :]
            k = tl.load(keys + place, mask=there, other=0.0).to(tl.float32)
            v = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            logits = tl.where(seen[None, :], logits, float("-inf"))
            larger = tl.maximum(highest, tl.max(logits, 1))
            decay = tl.exp(highest - larger)
            weight = tl.exp(logits - larger[:, None])
            sums = sums * decay + tl.sum(weight, 1)
            mixed = mixed * decay[:, None]
            mixed += tl.dot(weight, v, input_precision=PRECISION)
            highest = larger
        of_head = row * (KV_HEADS * GROUP) + head
        if SPLITS == 1:
            mixed = mixed / sums[:, None]
            to = out + of_head[:, None] * SIZE + column[None, :]
            tl.store(to, mixed.to(out.dtype.element_ty), mask=mask)
        else:
            place = of_head * SPLITS + split
            tl.store(out + place[:, None] * SIZE + column[None, :], mixed, mask=mask)
            tl.store(best + place, highest, mask=member < GROUP)
            tl.store(total + place, sums, mask=member < GROUP)

    @triton.jit
    def _merge_kernel(  # type: ignore[no-untyped-def]
        mixed,  # (R, H, S, c) fp32
        best,  # (R, H, S) fp32
        total,  # (R, H, S) fp32
        out,  # (R, H c)
        SPLITS: tl.constexpr,
        SIZE: tl.constexpr,
        BLOCK_SPLITS: tl.constexpr,
        BLOCK: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        head = tl.program_id(0).to(tl.int64)
        split = head * SPLITS + tl.arange(0, BLOCK_SPLITS)
        inside = tl.arange(0, BLOCK_SPLITS) < SPLITS
        column = tl.arange(0, BLOCK)
        highest = tl.load(best + split, mask=inside, other=-3.4028234663852886e38)
        weight = tl.exp(highest - tl.max(highest, 0))
        sums = tl.load(total + split, mask=inside, other=0.0)
        place = split[:, None] * SIZE + column[None, :]
        parts = tl.load(mixed + place, mask=inside[:, None] & (column[None, :] < SIZE), other=0.0)
        whole = tl.sum(parts * weight[:, None], 0) / tl.sum(sums * weight, 0)
        tl.store(out + head * SIZE + column, whole.to(out.dtype.element_ty), mask=column < SIZE)


def _splits(positions: int, programs: int, block: int) -> tuple[int, int]:
    """Return how many splits the positions of a cache have, and the positions of each."""
    if programs >= _ENOUGH:
        return 1, -(-positions // block) * block
    # Few sizes, since each is compiled.
    span = triton.next_power_of_2(max(block, -(-positions // _MOST_SPLITS)))
    span = max(span, min(_SPLIT, triton.next_power_of_2(positions)))
    return -(-positions // span), span


def cached_attention(
    qkv: Tensor,  # (R, (H + 2 K) c): all of q, then k, then v; not rotated
    cache: Cache,
    layer: DecoderLayer,
    backend: str,  # "torch" or "triton"
) -> Tensor:  # (R, H c)
    """Put one token a row into the cache, and attend to it and to all before it.

    With a window a token sees that many positions, its own included. Heads, scaling, window and
    norms are the layer's. Arithmetic is fp32; where the dtype is shorter, products are tf32, which
    holds every number of it. No gradient.

    Raises ValueError for a shape or dtype that does not fit.
    """
    require(backend, qkv)
    _check(qkv, cache, layer)
    if backend == "torch":
        return cached_attention_ref(qkv, cache, layer)
    rows, kv_heads, positions, size = cache.keys.shape
    heads, programs = layer.heads, rows * kv_heads
    out = qkv.new_empty(rows, heads * size)
    if rows == 0:
        return out
    block = max(16, triton.next_power_of_2(size))  # what tensor cores multiply
    # So that two stages of keys and values fit into the shared memory of every processor.
    block_t = max(16, min(128, (1 << 14) // (block * qkv.element_size())))
    splits, span = _splits(positions, programs, block_t)
    partial, best, total = out, qkv, qkv
    if splits > 1:
        partial = qkv.new_empty(rows, heads, splits, size, dtype=torch.float32)
        best, total = qkv.new_empty(2, rows, heads, splits, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _cached_attention_kernel[(programs, splits)](
            qkv.contiguous(), cache.keys, cache.values, cache.position, cache.cos, cache.sin,
            qkv if layer.q_norm is None else layer.q_norm,
            qkv if layer.k_norm is None else layer.k_norm, partial, best, total, layer.scaling,
            layer.eps, positions, KV_HEADS=kv_heads, GROUP=heads // kv_heads, SIZE=size,
            HALF=cache.cos.shape[1] // 2, WINDOW=layer.window or 0,
            NORMED=layer.q_norm is not None, SPLITS=splits, SPAN=span,
            BLOCK_GROUP=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK=block,
            BLOCK_T=block_t, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=2, enable_fp_fusion=True, **early(qkv),
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(rows * heads,)](
                partial, best, total, out, SPLITS=splits, SIZE=size,
                BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK=block, num_warps=4,
                enable_fp_fusion=True, **early(qkv),
            )  # fmt: skip
    return out


def _check(qkv: Tensor, cache: Cache, layer: DecoderLayer) -> None:
    keys, (rows, width) = cache.keys, qkv.shape
    shape = (rows, layer.kv_heads, keys.shape[2], layer.head_size)
    if width != (layer.heads + 2 * layer.kv_heads) * layer.head_size:
        raise ValueError(f"qkv: must hold {layer.heads} heads and keys and values, saw {width}")
    for name, tensor in (("keys", keys), ("values", cache.values)):
        if tensor.shape != shape or tensor.dtype != qkv.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: must be contiguous {shape} of {qkv.dtype} like qkv, saw "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    for name, table in (("cos", cache.cos), ("sin", cache.sin)):
        fits = table.dtype == torch.float32 and table.is_contiguous()
        if not fits or table.ndim != 2 or len(table) < shape[2] or table.shape[1] > shape[3]:
            raise ValueError(
                f"{name}: must be contiguous float32 (≥ {shape[2]}, ≤ {shape[3]}), saw "
                f"{tuple(table.shape)} of {table.dtype}"
            )
    if cache.position.shape != (rows,) or cache.position.dtype != torch.int64:
        raise ValueError(
            f"position: must be int64 ({rows},), saw {cache.position.dtype} "
            f"{tuple(cache.position.shape)}"
        )


def cached_attention_ref(qkv: Tensor, cache: Cache, layer: DecoderLayer) -> Tensor:
    """Compute the same in plain torch."""
    at = cache.position[:1]
    cos, sin = (table.index_select(0, at).to(qkv.dtype) for table in (cache.cos, cache.sin))
    q, k, v = qkv.unflatten(1, (-1, layer.head_size)).split(
        [layer.heads, layer.kv_heads, layer.kv_heads], dim=1
    )
    if layer.q_norm is not None and layer.k_norm is not None:
        q = F.rms_norm(q, layer.q_norm.shape, layer.q_norm, layer.eps)
        k = F.rms_norm(k, layer.k_norm.shape, layer.k_norm, layer.eps)
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    cache.keys.index_copy_(2, at, k[:, :, None])
    cache.values.index_copy_(2, at, v[:, :, None])
    every = torch.arange(cache.keys.shape[2], device=qkv.device)
    seen = every <= at
    if layer.window is not None:
        seen &= every > at - layer.window
    # The heads that share keys are, to torch, so many positions with one head.
    mixed = F.scaled_dot_product_attention(
        q.unflatten(1, (layer.kv_heads, -1)), cache.keys, cache.values, attn_mask=seen[None],
        scale=layer.scaling,
    )  # fmt: skip
    return mixed.reshape(len(qkv), -1)
