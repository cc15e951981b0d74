"""Which units run together, and how many rows of them at once.

All rows of a forward run at the length of its longest, so units are put into buckets of similar
length. Letters: N targets, L input positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prototok.fitting.engine.inputs import Inputs
from prototok.fitting.engine.rows import Row, Unit
from prototok.fitting.engine.slots import Capacity, Slots
from prototok.fitting.engine.step import forward_backward
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM

# Positions a forward from which on more rows make it longer in proportion, by device: what
# `batch_size="auto"` aims at on the CPU, where more rows also leave the caches, and the most it
# takes on CUDA.
_FULL = {"cpu": 2048, "cuda": 65536}
# Positions below which another row costs next to nothing: fewer than these make no bucket.
_FEW = {"cpu": 512, "cuda": 4096}
# Units of less than this share of a bucket's length get one of their own.
_SIMILAR = 0.75


@dataclass(frozen=True)
class Bucket:
    units: tuple[Unit, ...]  # longest first
    length: int  # N of the longest
    rows: int  # a forward


def make_buckets(
    lm: FrozenLM, units: list[Unit], inputs: Inputs, recipe: Recipe, backend: str,
    batch_size: int | None,
) -> Iterator[Bucket]:  # fmt: skip
    """Units in buckets of similar length, the longest first; sharing groups stay whole.

    `batch_size` rows a forward, or as many as are good at each length where it is None.
    """
    few = _FEW.get(lm.device.type, 0)
    queue = sorted(units, key=lambda unit: -unit.length)
    while queue:
        length = queue[0].length
        positions = inputs.input_length(length)
        most = batch_size or rows_that_fit(lm, inputs, recipe, backend, length)
        enough = min(most, -(-few // positions))
        taken = rows = 0
        while taken < len(queue) and (
            rows < enough or inputs.input_length(queue[taken].length) >= _SIMILAR * positions
        ):
            rows += len(queue[taken].rows)
            taken += 1
        yield Bucket(tuple(queue[:taken]), length, min(most, rows))
        queue = queue[taken:]


def rows_that_fit(lm: FrozenLM, inputs: Inputs, recipe: Recipe, backend: str, length: int) -> int:
    """`batch_size="auto"`: rows a forward, of N = `length` targets."""
    full = max(1, _FULL.get(lm.device.type, 2048) // inputs.input_length(length))
    if lm.device.type != "cuda":
        return full
    probe = min(full, 8)
    try:
        # The first also sets up what libraries keep for good, and does not count.
        _, one, several = (_peak(lm, inputs, recipe, backend, length, n) for n in (1, 1, probe))
    except torch.OutOfMemoryError:
        return 1
    free, _ = torch.cuda.mem_get_info(lm.device)
    # The peak may not grow at all between few rows: what the head keeps at most is reserved anyway.
    a_row = max((several - one) / max(1, probe - 1), several / probe / 4, 1.0)
    room = 0.8 * free - one
    return int(min(full, max(1, 1 + room // a_row)))


def _peak(
    lm: FrozenLM, inputs: Inputs, recipe: Recipe, backend: str, length: int, rows: int
) -> int:
    """Bytes that a forward and backward of so many rows takes beside the weights."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(lm.device)
    torch.cuda.reset_peak_memory_stats(lm.device)
    slots = Slots(lm, inputs, recipe, backend, Capacity(rows, rows, length))
    ids = torch.zeros(length, dtype=torch.int64, device="cpu")
    slots.admit([Unit(r, (Row(r, r, 0, ids),), None) for r in range(rows)])
    leaves = [bank.values.detach().requires_grad_() for bank in slots.banks]
    forward_backward(lm, slots, leaves, slice(0, rows))
    return torch.cuda.max_memory_allocated(lm.device) - before
