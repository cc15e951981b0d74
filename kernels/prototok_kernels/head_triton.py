"""The Triton pass over the head's logits, and how many rows of them to take at a time on CUDA.

Beside linear_cross_entropy.py, not in it, so that a machine without triton never imports this file.

Letters: R rows (one row = one position of one text), d hidden size, V vocabulary, C rows a chunk.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from prototok_kernels.activation import _LOG2_E, _exp2

# A thread reads a group of 16 bytes of bf16 at a time. What a program takes lets two share a
# processor, or one where rows are long: of more the second cache does not hold what is read again.
_GROUP = 8
_BLOCK, _WARPS = 8192, 32
_LONG_BLOCK, _LONG_WARPS, _LONG_VOCABULARY = 16384, 32, 65536
# The tiles that a product on CUDA is made of, and what a value takes of each: half a tile reads its
# factors more often, assumed to be a tenth. Chunks are a multiple of _ROWS.
TILES, _ROWS = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 1.1}, 128


@triton.jit
def _head_kernel(
    logits,  # (C, V)
    gradient,  # (C, V), may be logits
    targets,  # (C,) int64
    token_weight,  # (C,) fp32
    loss,  # (C,) fp32
    predicted,  # (C,) int64
    margin,  # (C,) fp32
    inverse_temperature,
    vocabulary: tl.constexpr,  # V, one per model; the interpreter of triton 3.6 with numpy 2.4
    # cannot loop up to a number that is given at run time
    HAS_TOKEN_WEIGHT: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program a row. The target is kept apart from the other logits: the best of those is
    # the margin's other half, and log1p(sum of others) and p - 1 = -(sum of others) / total
    # lose no digits when the target has almost all of the probability.
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    target = tl.load(targets + row)
    # A wrong target must not read foreign memory; there is no host to raise, so it gives NaN.
    valid = (target >= 0) & (target < vocabulary)
    own = tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32)

    # Every group of columns that a thread reads at once keeps its own maximum and sum, so that the
    # loop has no reduction across threads and one exponential an element. Where a maximum stands in
    # its group is looked up at the end. The start is finite because -inf minus -inf is NaN.
    group = tl.arange(0, BLOCK // GROUP) * GROUP
    within = tl.arange(0, GROUP)
    best = tl.full((BLOCK // GROUP,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK // GROUP,), tl.float32)
    where = tl.full((BLOCK // GROUP,), 2147483647, tl.int32)
    scale2 = inverse_temperature * _LOG2_E
    for start in range(0, vocabulary, BLOCK):
        columns = start + group[:, None] + within[None, :]
        inside = columns < vocabulary  # and nothing else, or they are loaded one by one
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if (start <= target) & (target < start + BLOCK):
            x = tl.where(columns == target, float("-inf"), x)
        highest = tl.max(x, 1)
        where = tl.where(highest > best, start + group, where)
        highest = tl.maximum(highest, best)
        total *= _exp2((best - highest) * scale2)
        total += tl.sum(_exp2((x - highest[:, None]) * scale2), 1)
        best = highest
    rival = tl.max(best, 0)
    others = tl.sum(total * _exp2((best - rival) * scale2), 0)
    column = tl.min(tl.where(best == rival, where, 2147483647), 0).to(tl.int64) + within
    of_group = tl.load(logits + column, mask=column < vocabulary, other=float("-inf"))
    found = (of_group.to(tl.float32) == rival) & (column != target)
    rival_index = tl.min(tl.where(found, column, 2147483647), 0)
    rival = tl.where(rival_index < vocabulary, rival, float("-inf"))  # V = 1: there is none

    leads = own >= rival
    top = tl.maximum(own, rival)
    gap = tl.abs(own - rival) * inverse_temperature
    rest = tl.where(leads, others * tl.exp(-gap), others)
    whole = rest + tl.where(leads, 1.0, tl.exp(-gap))
    # log1p by Goldberg's identity: the rounding error of 1 + rest divides out.
    rounded = whole - 1.0
    log1p = tl.where(rounded == 0.0, rest, tl.log(whole) * (rest / rounded))
    tl.store(loss + row, tl.where(leads, log1p, tl.log(whole) + gap))
    own_wins = (own > rival) | ((own == rival) & (target < rival_index))
    tl.store(predicted + row, tl.where(own_wins, target, rival_index))
    tl.store(margin + row, own - rival)

    if NEED_GRAD:
        gradient += row * vocabulary
        scale = inverse_temperature
        if HAS_TOKEN_WEIGHT:
            scale = tl.load(token_weight + row) * inverse_temperature
        factor = scale / whole
        tl.debug_barrier()  # nothing is written in place of logits that are still to be read
        for start in range(0, vocabulary, BLOCK):
            columns = start + group[:, None] + within[None, :]
            inside = columns < vocabulary
            x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
            slope = _exp2((x - top) * scale2) * factor
            if (start <= target) & (target < start + BLOCK):
                slope = tl.where(columns == target, -rest * factor, slope)
            tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=inside)


def triton_pass(
    logits: Tensor,  # (C, V)
    gradient: Tensor | None,  # (C, V), may be logits; None = not wanted
    targets: Tensor,  # (C,)
    token_weight: Tensor | None,  # (C,)
    temperature: float,
    loss: Tensor,  # (C,), written, as are the next two
    predicted: Tensor,  # (C,)
    margin: Tensor,  # (C,)
) -> None:
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    block, warps = (_LONG_BLOCK, _LONG_WARPS) if vocabulary > _LONG_VOCABULARY else (_BLOCK, _WARPS)
    while block // 2 >= max(_GROUP, vocabulary):
        block, warps = block // 2, max(1, warps // 2)
    with torch.cuda.device_of(logits):
        _head_kernel[(rows,)](
            logits,
            logits if gradient is None else gradient,
            targets,
            loss if token_weight is None else token_weight,
            loss,
            predicted,
            margin,
            1.0 / temperature,
            vocabulary=vocabulary,
            HAS_TOKEN_WEIGHT=token_weight is not None,
            NEED_GRAD=gradient is not None,
            BLOCK=block,
            GROUP=_GROUP,
            num_warps=warps,
            enable_fp_fusion=True,  # triton's default differs from version to version
        )


@lru_cache(maxsize=1024)
def whole_waves(rows: int, size: int, largest: int, processors: int) -> int:
    """Return the rows of a chunk, at most `largest`, that leave the fewest processors idle.

    The gradient's product, (C, V) by (V, d), has few tiles, and the processors take them in waves:
    what counts is the time of all chunks' waves, by the tiles that suit each best. Of those alike
    the smallest is taken.
    """

    def time(count: int) -> float:
        def waves(tall: int, wide: int) -> int:
            return -(-(-(-count // tall) * -(-size // wide)) // processors)

        return min(waves(*tile) * tile[0] * tile[1] * each for tile, each in TILES.items())

    def in_all(chunk: int) -> float:
        whole, rest = divmod(rows, chunk)
        return whole * time(chunk) + time(rest)

    most = max(1, min(rows, largest))
    return min([*range(_ROWS, most, _ROWS), most], key=in_all)
