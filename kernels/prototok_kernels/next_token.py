"""The most likely token behind each row, and the step to it: the end of a token's forward.

Where rows are few, the head's product keeps the best logit of every few outputs in place of the
logits. A last launch finds the best of those, writes the id, puts its embedding into the stream and
moves each row's counters on, so that the next token needs nothing of the host.

Letters: R rows, d hidden size, V vocabulary, P candidates a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prototok_kernels.backend import early, require
from prototok_kernels.normed_products import outputs_a_program, warps_of

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = None

_TILES = 16  # of outputs that a program of the head's product makes, one after the other


@dataclass(frozen=True)
class Stream:
    """What a row of the decoder is at; all of it is written.

    x         (R, d) the stream, which begins with the embedding of the last token
    ids       (≥ tokens, R) int64
    written   (R,) int64, the same in every row: rows of `ids` that are written
    position  (R,) int64, likewise: positions of the cache that are taken
    """

    x: Tensor
    ids: Tensor
    written: Tensor
    position: Tensor


if triton is not None:

    @triton.jit
    def _best_logit_kernel(  # type: ignore[no-untyped-def]
        h,  # (R, d), behind the last norm
        weight,  # (V, d)
        best,  # (R, P) fp32: of each program's outputs the largest logit
        index,  # (R, P) int32: and where it stands
        R: tl.constexpr,
        D: tl.constexpr,
        V: tl.constexpr,
        TILES: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,  # ≥ R
        BLOCK_OUT: tl.constexpr,
        BLOCK: tl.constexpr,  # ≥ d
        EARLY: tl.constexpr,
    ):
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        rows = tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, BLOCK)
        inside = column < D
        highest = tl.full((BLOCK_ROWS, BLOCK_OUT), float("-inf"), tl.float32)
        found = tl.full((BLOCK_ROWS, BLOCK_OUT), 2147483647, tl.int32)
        for tile in range(TILES):
            output = (tl.program_id(0) * TILES + tile) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            there = output < V
            at = output[:, None].to(tl.int64) * D + column[None, :]
            held = tl.load(weight + at, mask=there[:, None] & inside[None, :], other=0.0)
            held = held.to(tl.float32)
            for row in tl.static_range(R):
                of_row = tl.load(h + row * D + column, mask=inside, other=0.0).to(tl.float32)
                logit = tl.where(there, tl.sum(held * of_row[None, :], 1), float("-inf"))
                larger = (rows[:, None] == row) & (logit[None, :] > highest)
                highest = tl.where(larger, logit[None, :], highest)
                found = tl.where(larger, output[None, :], found)
        top = tl.max(highest, 1)
        first = tl.min(tl.where(highest == top[:, None], found, 2147483647), 1)
        place = rows * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + place, top, mask=rows < R)
        tl.store(index + place, first, mask=rows < R)

    @triton.jit
    def _next_token_kernel(  # type: ignore[no-untyped-def]
        scores,  # (R, P)
        index,  # (R, P) int32: the token of each; read only with INDEXED
        embedding,  # (V, d)
        x,  # (R, d)
        ids,  # (tokens, R)
        written,  # (R,)
        position,  # (R,)
        candidates: tl.constexpr,  # P
        vocabulary,  # V
        D: tl.constexpr,
        INDEXED: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        found = tl.full((BLOCK,), 2147483647, tl.int32)
        for start in range(0, candidates, BLOCK):
            place = start + lanes
            there = place < candidates
            score = tl.load(scores + row * candidates + place, mask=there, other=float("-inf"))
            token = place
            if INDEXED:
                token = tl.load(index + row * candidates + place, mask=there, other=2147483647)
            larger = score.to(tl.float32) > highest
            highest = tl.where(larger, score.to(tl.float32), highest)
            found = tl.where(larger, token, found)
        top = tl.max(highest, 0)
        # The first of those alike; logits that are not numbers give the last token, not a place
        # outside of the table.
        token = tl.min(tl.where(highest == top, found, 2147483647), 0).to(tl.int64)
        token = tl.minimum(token, vocabulary - 1)
        at = tl.load(written + row)
        tl.store(ids + at * tl.num_programs(0) + row, token)
        column = tl.arange(0, BLOCK_D)
        vector = tl.load(embedding + token * D + column, mask=column < D, other=0.0)
        tl.store(x + row * D + column, vector, mask=column < D)
        tl.store(written + row, at + 1)
        tl.store(position + row, tl.load(position + row) + 1)


def best_logits(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return candidates for each row's largest logit: values (R, P) fp32 and ids (R, P) int32.

    h is (R, d), weight (V, d). One Triton launch, which reads the weight once for all rows and
    writes no logits; the first of those alike is kept. R is to be small.

    Raises ValueError for a shape or dtype that does not fit, or where Triton does not run.
    """
    require("triton", h)
    rows, size = h.shape
    vocabulary = len(weight)
    if weight.shape[1:] != (size,) or weight.dtype != h.dtype:
        raise ValueError(
            f"weight: must be (V, {size}) of {h.dtype} like h, saw "
            f"{tuple(weight.shape)} of {weight.dtype}"
        )
    block = triton.next_power_of_2(size)
    block_out = outputs_a_program(vocabulary, block * h.element_size())
    programs = triton.cdiv(vocabulary, block_out * _TILES)
    best = h.new_empty(rows, programs, dtype=torch.float32)
    index = h.new_empty(rows, programs, dtype=torch.int32)
    if rows == 0:
        return best, index
    with torch.cuda.device_of(h):
        _best_logit_kernel[(programs,)](
            h.contiguous(), weight.contiguous(), best, index, R=rows, D=size, V=vocabulary,
            TILES=_TILES, BLOCK_ROWS=triton.next_power_of_2(rows), BLOCK_OUT=block_out, BLOCK=block,
            num_warps=warps_of(block_out * block), enable_fp_fusion=True, **early(h),
        )  # fmt: skip
    return best, index


def take_next_(
    stream: Stream,
    scores: Tensor,  # (R, P), of candidates; without `index` the logits (R, V)
    index: Tensor | None,  # (R, P) int32
    embedding: Tensor,  # (V, d)
    backend: str,  # "torch" or "triton"
) -> None:
    """Step to the token with the largest score in each row.

    Raises ValueError for a shape or dtype that does not fit.
    """
    require(backend, scores)
    rows, size = stream.x.shape
    counters = (("written", stream.written), ("position", stream.position))
    for name, tensor, shape in (*((n, t, (rows,)) for n, t in counters), ("ids", stream.ids, None)):
        if tensor.dtype != torch.int64 or (shape or (len(tensor), rows)) != tensor.shape:
            raise ValueError(f"{name}: must be int64 of {rows} rows, saw {tuple(tensor.shape)}")
    if embedding.shape[1:] != (size,) or embedding.dtype != stream.x.dtype:
        raise ValueError(f"embedding: must be (V, {size}), saw {tuple(embedding.shape)}")
    if backend == "torch":
        take_next_ref_(stream, scores, index, embedding)
        return
    if rows == 0:
        return
    block = min(4096, triton.next_power_of_2(scores.shape[1]))
    with torch.cuda.device_of(scores):
        _next_token_kernel[(rows,)](
            scores.contiguous(), scores if index is None else index, embedding.contiguous(),
            stream.x, stream.ids, stream.written, stream.position, scores.shape[1],
            len(embedding), D=size, INDEXED=index is not None, BLOCK=block,
            BLOCK_D=triton.next_power_of_2(size), num_warps=min(16, max(1, block // 256)),
            enable_fp_fusion=True, **early(scores),
        )  # fmt: skip


def take_next_ref_(stream: Stream, scores: Tensor, index: Tensor | None, embedding: Tensor) -> None:
    """Compute the same in plain torch."""
    token = scores.argmax(dim=1)
    if index is not None:
        token = index.gather(1, token[:, None])[:, 0].long()
    torch.index_select(embedding, 0, token, out=stream.x)
    stream.ids.index_copy_(0, stream.written[:1], token[None])
    stream.written.add_(1)
    stream.position.add_(1)
