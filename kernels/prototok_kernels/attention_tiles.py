"""What the kernels of attention in tiles share: loads, rotations, stores and weights.

The coordinates of q and k lie in a tile as the pairs that are rotated, one behind the other: a
product over them does not care for their order.

Letters: as in attention_triton.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    from prototok_kernels.activation import _exp2
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _load_pairs(x, row, mask, HALF: tl.constexpr, PAIRS: tl.constexpr):
        """Both coordinates of the pairs of rows that start at x + row: (rows, pairs) twice."""
        low, high = _pair_columns(HALF, PAIRS)
        rows = x + row[:, None]
        return (
            tl.load(rows + low[None, :], mask=mask[:, None], other=0.0),
            tl.load(rows + high[None, :], mask=mask[:, None], other=0.0),
        )

    @triton.jit
    def _pair_columns(HALF: tl.constexpr, PAIRS: tl.constexpr):
        """Where a pair's coordinates are; those that are not rotated are paired as well."""
        pair = tl.arange(0, PAIRS)
        if HALF == PAIRS:
            return pair, pair + PAIRS
        low = tl.where(pair < HALF, pair, pair + HALF)
        high = tl.where(pair < HALF, pair + HALF, pair + PAIRS)
        # Neighbours, as far as HALF and PAIRS let the compiler know.
        ALIKE: tl.constexpr = (HALF | PAIRS) & -(HALF | PAIRS)
        low = tl.max_contiguous(tl.multiple_of(low, ALIKE), ALIKE)
        return low, tl.max_contiguous(tl.multiple_of(high, ALIKE), ALIKE)

    @triton.jit
    def _angles(cos, sin, table_row, position, mask, HALF: tl.constexpr, PAIRS: tl.constexpr):
        """Cosine and sine (positions, pairs), 1 and 0 where nothing is rotated."""
        pair = tl.arange(0, PAIRS)
        at = position[:, None] * table_row + pair[None, :]
        turns = mask[:, None] & (pair[None, :] < HALF)
        return tl.load(cos + at, mask=turns, other=1.0), tl.load(sin + at, mask=turns, other=0.0)

    @triton.jit
    def _turned(low, high, c, s):
        """The rotated pairs as a tile, a pair's coordinates side by side."""
        dtype = low.dtype
        low, high = low.to(tl.float32), high.to(tl.float32)
        turned = tl.join((low * c - high * s).to(dtype), (high * c + low * s).to(dtype))
        return tl.reshape(turned, (turned.shape[0], 2 * turned.shape[1]))

    @triton.jit
    def _store_turned_back(tile, c, s, out, row, mask, HALF: tl.constexpr, PAIRS: tl.constexpr):
        """Write the gradient of what was rotated, from that of its tile."""
        low, high = tl.split(tl.reshape(tile, (tile.shape[0], PAIRS, 2)))
        to_low, to_high = _pair_columns(HALF, PAIRS)
        rows = out + row[:, None]
        dtype = out.dtype.element_ty
        tl.store(rows + to_low[None, :], (low * c + high * s).to(dtype), mask=mask[:, None])
        tl.store(rows + to_high[None, :], (high * c - low * s).to(dtype), mask=mask[:, None])

    @triton.jit
    def _keys_and_values(
        qkv, cos, sin, prefix, kv_head, length, table_row, j, HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, PREFIX: tl.constexpr,
    ):  # fmt: skip
        """Tiles of all keys, rotated, and of all values; j numbers them, those in front first."""
        PAIRS: tl.constexpr = SIZE // 2
        STACK: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
        position = j - PREFIX
        own = (position >= 0) & (position < length)
        row = position * STACK + (HEADS + kv_head) * SIZE
        column = tl.arange(0, SIZE)[None, :]
        low, high = _load_pairs(qkv, row, own, HALF, PAIRS)
        value = qkv + row[:, None] + KV_HEADS * SIZE + column
        v = tl.load(value, mask=own[:, None], other=0.0)
        if PREFIX > 0:
            front = j < PREFIX
            row = (kv_head * PREFIX + j) * SIZE
            front_low, front_high = _load_pairs(prefix, row, front, HALF, PAIRS)
            low = tl.where(front[:, None], front_low, low)
            high = tl.where(front[:, None], front_high, high)
            value = prefix + KV_HEADS * PREFIX * SIZE + row[:, None] + column
            front_v = tl.load(value, mask=front[:, None], other=0.0)
            v = tl.where(front[:, None], front_v, v)
        c, s = _angles(cos, sin, table_row, position, own, HALF, PAIRS)
        return _turned(low, high, c, s), v

    @triton.jit
    def _product(a, b, WIDE: tl.constexpr):
        """a · b, summed in fp32."""
        if WIDE:
            return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        return tl.dot(a, b)

    @triton.jit
    def _logits(q, k, i, j, scale, BEFORE: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr):
        """Logits (queries, keys), fp32, times log2 e, of queries that stand at keys i.

        BEFORE: all keys stand before all queries. Rows beyond the text see what they happen to
        see. They must only be finite, for what becomes of them is multiplied by zero.
        """
        logits = _product(q, tl.trans(k), WIDE) * scale
        distance = i[:, None] - j[None, :]
        if not BEFORE:
            logits = tl.where(distance >= 0, logits, -3.4028234663852886e38)
        if WINDOW > 0:
            logits = tl.where(distance < WINDOW, logits, -3.4028234663852886e38)
        return logits

    @triton.jit
    def _weights(q, k, i, j, scale, WINDOW: tl.constexpr, WIDE: tl.constexpr):
        """Exponentials (queries, keys), fp32, of which the largest is 1, and their sums."""
        logits = _logits(q, k, i, j, scale, False, WINDOW, WIDE)
        weights = _exp2(logits - tl.max(logits, 1)[:, None])
        return weights, tl.sum(weights, 1)[:, None]
