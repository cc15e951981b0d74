"""Rows and groups: what is fitted, and what enters and leaves the device together.

A row is one text with one seed. A group is the rows that share a vector, one row where nothing is
shared. Letters: N targets, K leading vectors, d hidden size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    index: int  # text × seeds + seed, the row's place in the results
    text: int
    seed: int
    targets: Tensor  # (N,) int64, CPU
    start: Tensor | None = None  # (slots, d) fp32: vectors to go on from


@dataclass(frozen=True)
class Group:
    index: int  # among the groups; the row's index where nothing is shared
    rows: tuple[Row, ...]
    share: str | None

    @property
    def length(self) -> int:
        return max(len(row.targets) for row in self.rows)


def make_groups(
    targets: list[Tensor], seeds: list[int], share: str | None, group_size: int | None
) -> list[Group]:
    """Make rows text by text; a group is `group_size` texts in order with all of their seeds."""
    rows = [
        Row(t * len(seeds) + s, t, seed, ids)
        for t, ids in enumerate(targets)
        for s, seed in enumerate(seeds)
    ]
    if share is None:
        return [Group(row.index, (row,), None) for row in rows]
    per_group = (group_size or len(targets)) * len(seeds)
    return [
        Group(g, tuple(rows[start : start + per_group]), share)
        for g, start in enumerate(range(0, len(rows), per_group))
    ]


def initial_vectors(group: Group, leading: int, width: int, std: float) -> tuple[Tensor, Tensor]:
    """Draw e (n_e, K, d) and m (n_m, d), fp32: one for each row, or one in all if it is shared.

    A row's vectors depend on its seed and its targets alone: not on the batch, the order of the
    texts, the device or the number of other rows. A shared vector depends on those of its group.
    """
    rows = [(row.seed, row.targets.numpy().tobytes()) for row in group.rows]
    digest = hashlib.sha256()
    for seed, ids in sorted(rows):
        digest.update(f"{seed} {len(ids)} ".encode() + ids)
    together = [(0, digest.digest())]

    def draw(name: str, size: int) -> Tensor:
        drawn = [
            _normal(f"{name} {seed} ".encode() + key, size)
            for seed, key in (together if group.share == name else rows)
        ]
        return torch.from_numpy(np.stack(drawn)) * std

    return draw("e", leading * width).view(-1, leading, width), draw("m", width)


def _normal(key: bytes, size: int) -> np.ndarray:
    """Draw `size` values of N(0, 1), fp32, from a counter-based generator keyed by the bytes."""
    words = np.frombuffer(hashlib.sha256(key).digest()[:16], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words))
    return generator.standard_normal(size, dtype=np.float32)
