"""Which groups run together, and how many rows of them at once.

All rows of a forward run at the length of its longest, so groups are put into buckets of similar
length; of one length where a model's rope depends on it. Letters: N targets, L input positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prototok.common.urgent import on_cuda
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.engine.step import forward_backward

# Positions a forward from which on more rows make it longer in proportion, by device: what
# `batch_size="auto"` aims at on the CPU, where more rows also leave the caches, and the most it
# takes on CUDA.
_FULL = {"cpu": 2048, "cuda": 65536}
# Positions below which another row costs next to nothing: fewer than these make no bucket.
_FEW = {"cpu": 512, "cuda": 4096}
# Groups of less than this share of a bucket's length get one of their own.
_SIMILAR = 0.75


@dataclass(frozen=True)
class Bucket:
    groups: tuple[Group, ...]  # longest first
    length: int  # N of the longest
    rows: int  # a forward


def make_buckets(setup: Setup, groups: list[Group]) -> Iterator[Bucket]:
    """Put groups into buckets of similar length, the longest first; sharing groups stay whole."""
    few = _FEW.get(setup.lm.device.type, 0)
    inputs, apart = setup.inputs, setup.lm.body.by_length
    if apart and any(len(row.targets) != group.length for group in groups for row in group.rows):
        raise ValueError(
            "texts: those that share a vector must be as long as each other on this model, for its "
            "rope follows the length"
        )
    queue = sorted(groups, key=lambda group: -group.length)
    while queue:
        length = queue[0].length
        positions = inputs.input_length(length)
        most = setup.batch_size or rows_that_fit(setup, length)
        enough = min(most, -(-few // positions))
        taken = rows = 0
        while taken < len(queue) and (
            queue[taken].length == length if apart
            else rows < enough
            or inputs.input_length(queue[taken].length) >= _SIMILAR * positions
        ):  # fmt: skip
            rows += len(queue[taken].rows)
            taken += 1
        yield Bucket(tuple(queue[:taken]), length, min(most, rows))
        queue = queue[taken:]


def rows_that_fit(setup: Setup, length: int) -> int:
    """Return how many rows of N = `length` targets a forward takes when nobody says."""
    lm = setup.lm
    full = max(1, _FULL.get(lm.device.type, 2048) // setup.inputs.input_length(length))
    if not on_cuda(lm.device):
        return full
    probe = min(full, 8)
    try:
        # The first also sets up what libraries keep for good, and does not count.
        _, one, several = (_peak(setup, length, n) for n in (1, 1, probe))
    except torch.OutOfMemoryError:
        return 1
    free, _ = torch.cuda.mem_get_info(lm.device)
    # The peak may not grow at all between few rows: what the head keeps at most is reserved anyway.
    a_row = max((several - one) / max(1, probe - 1), several / probe / 4, 1.0)
    room = 0.8 * free - one
    return int(min(full, max(1, 1 + room // a_row)))


def _peak(setup: Setup, length: int, rows: int) -> int:
    """Measure the bytes that a forward and backward of `rows` rows takes beside the weights."""
    lm = setup.lm
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(lm.device)
    torch.cuda.reset_peak_memory_stats(lm.device)
    slots = Slots(setup, Room(rows, rows, length))
    ids = torch.zeros(length, dtype=torch.int64, device="cpu")
    slots.admit([Group(r, (Row(r, r, 0, ids),), None) for r in range(rows)])
    leaves = [bank.values.detach().requires_grad_() for bank in slots.banks]
    forward_backward(lm, slots, leaves, slice(0, rows))
    return torch.cuda.max_memory_allocated(lm.device) - before
