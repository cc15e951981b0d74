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

# A thread reads 16 bytes of bf16 at a time. With 16 warps its registers (60 on sm_90) let two
# programs share a processor: one reduces while the other reads. Two rows of a long vocabulary on
# each processor are more than the second cache holds until they are read again; one is not.
_BLOCK, _LONG_BLOCK, _LONG_VOCABULARY = 4096, 8192, 65536
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

    # Every lane keeps its own maximum and sum, so that the loop has no reduction across warps,
    # and needs one exponential an element whether or not the maximum moves. The start is
    # finite because -inf minus -inf is NaN.
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    index = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + lanes
        inside = columns < vocabulary  # and nothing else, or they are loaded one by one
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(columns == target, float("-inf"), x)
        grows = x > best
        decay = tl.exp(-tl.abs(x - best) * inverse_temperature)
        total = tl.where(grows, total * decay + 1.0, total + decay)
        index = tl.where(grows, columns, index)
        best = tl.where(grows, x, best)
    rival = tl.max(best, 0)
    others = tl.sum(total * tl.exp((best - rival) * inverse_temperature), 0)
    rival_index = tl.min(tl.where(best == rival, index, 2147483647), 0).to(tl.int64)
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
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            inside = columns < vocabulary
            x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.exp((x - top) * inverse_temperature) * factor
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
    longest = _LONG_BLOCK if vocabulary > _LONG_VOCABULARY else _BLOCK
    block = min(longest, triton.next_power_of_2(vocabulary))
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
            num_warps=max(1, block // 256),
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
