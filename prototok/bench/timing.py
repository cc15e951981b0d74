"""Timing one forward against every autoregressive way, and what the machine would allow.

Letters: B batch, N tokens of a text, P weights that are multiplied with.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prototok.autoregressive.generate import matrices
from prototok.bench import machine
from prototok.bench.baselines import CACHES, Engine, Generate
from prototok.bench.vllm import vllm_seconds
from prototok.common.clock import once, timed
from prototok.decoding.decode import decode_ids
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement

BATCHES = (1, 16, 64)
ONE = "one forward"
ENGINE = "engine static-KV"
VLLM = "vLLM"
_TURNS = 4
_LARGE = 2_000_000_000  # parameters
_CHECKED = 16  # tokens the baselines must agree on before they are timed


@dataclass(frozen=True)
class Peak:
    """What this machine does in one dtype: a large square product, and a copy (read + write)."""

    flops_per_second: float
    bytes_per_second: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Peak:
        return cls(machine.matmul_rate(device, dtype), machine.copy_rate(device))


@dataclass(frozen=True)
class Timing:
    """One way of producing N tokens: median and quartiles of seconds a call, by batch size.

    share: of what the machine allows. For one forward of its roofline, the larger of FLOPs over the
    measured rate of a matrix product and bytes of weights over that of a copy; for our own decoder
    the bytes of weights and cache that it must read over the rate of the copy. Weights that stay in
    a cache can exceed 1. None for the others.
    """

    method: str
    dtype: str
    batch: int
    seconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    share: float | None = None


def ceiling(length: int, dtype: torch.dtype, peak: Peak) -> float:
    """Return the largest ratio that two efficient implementations can show at batch 1.

    A decoding step reads each weight once, itemsize bytes, and a forward over N positions spends
    2 N FLOPs on it; so the ratio is at most N, and at most FLOP/s over weights read a second / 2.
    """
    return min(length, peak.flops_per_second / 2 / (peak.bytes_per_second / dtype.itemsize))


def roofline_seconds(lm: FrozenLM, batch: int, length: int, peak: Peak) -> float | None:
    """Return the seconds one forward takes at least; None for models of the general family.

    2 P FLOPs a position, attention's own products left out, and every weight read once.
    """
    weights = matrices(lm)
    if weights is None:
        return None
    flops = 2 * sum(w.numel() for w in weights) * batch * length
    read = sum(w.nbytes for w in weights)
    return max(flops / peak.flops_per_second, read / peak.bytes_per_second)


def require_equal_tokens(lm: FrozenLM, length: int) -> None:
    """Raise RuntimeError unless all our baselines generate the same tokens in float32.

    Not asked of models so large that float32 copies of them would not fit beside them.
    """
    if sum(p.numel() for p in lm.source.parameters()) > _LARGE:
        return
    length = min(length, _CHECKED)
    baseline = Generate(lm, torch.float32)
    found = {f"generate, {cache} cache": baseline(length, 1, cache) for cache in CACHES}
    if lm.body.family != "general":
        found[ENGINE] = Engine(lm, torch.float32)(length, 1)
    first = next(iter(found.values())).cpu()
    for method, ids in found.items():
        if not torch.equal(ids.cpu(), first):
            raise RuntimeError(
                f"{method} generates other tokens than generate with its dynamic cache in float32; "
                "nothing is timed"
            )


def time_all(
    lm: FrozenLM,
    vectors: Tensor | None,  # (1, slots, d); None: only the autoregressive ways
    length: int,
    peak: Peak,
    vllm_python: Path | None = None,
) -> list[Timing]:
    """Time all ways at all batch sizes; they take turns at each size, so that drift hits all.

    A prefix that `lm` has stands in front of the one forward alone.
    """
    dtypes = [lm.dtype]
    if lm.device.type == "cpu" and lm.dtype != torch.float32:
        dtypes.append(torch.float32)  # at batch 1 the wider dtype can be the faster baseline
    generate = {dtype: Generate(lm.bare, dtype) for dtype in dtypes}
    own = lm.body.family != "general"
    engine = {dtype: Engine(lm.bare, dtype) for dtype in dtypes if own}
    arrangement = Arrangement.parse("e m*")
    timings = []
    for batch in BATCHES:
        ways: dict[tuple[str, torch.dtype], Callable[[], object]] = {}
        if vectors is not None:
            rows = vectors.expand(batch, -1, -1)
            ways[ONE, lm.dtype] = functools.partial(
                decode_ids, lm, rows, arrangement, length, "auto"
            )
        for dtype, decoder in engine.items():
            ways[ENGINE, dtype] = decoder.call(length, batch)
        quick = list(ways)
        for dtype, baseline in generate.items():
            if batch > 1 and dtype != lm.dtype:
                continue  # nowhere the stronger one, and half of the bench's time
            for cache in CACHES:
                ways[f"generate, {cache} cache", dtype] = baseline.call(length, batch, cache)
        seconds: dict[tuple[str, torch.dtype], list[float]] = {way: [] for way in ways}
        for turn in range(_TURNS):
            for way, call in ways.items():
                spent = once(call, lm.device)
                if turn:  # the first warms up
                    seconds[way].append(spent)
        # A way that takes milliseconds needs more readings than one that takes seconds.
        for way in quick:
            seconds[way] += timed(ways[way], lm.device, 0.1)
        for (method, dtype), readings in seconds.items():
            share = None
            middle = statistics.median(readings)
            if method == ENGINE:
                must = engine[dtype].bytes_read(length, batch)
                share = must / middle / peak.bytes_per_second
            elif method == ONE:
                least = roofline_seconds(lm, batch, length, peak)
                share = None if least is None else least / middle
            timings.append(timing(method, dtype, batch, length, readings, share))
    if vllm_python is not None:
        for batch, readings in vllm_seconds(lm, length, BATCHES, vllm_python).items():
            timings.append(timing(VLLM, lm.dtype, batch, length, readings))
    return timings


def timing(
    method: str, dtype: torch.dtype, batch: int, length: int, readings: Sequence[float],
    share: float | None = None,
) -> Timing:  # fmt: skip
    """Make a Timing of single readings, in seconds."""
    low, middle, high = statistics.quantiles(readings, n=4)
    return Timing(
        method, str(dtype).removeprefix("torch."), batch, middle, (low, high),
        batch * length / middle, share,
    )  # fmt: skip
