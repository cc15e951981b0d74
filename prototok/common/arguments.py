"""Checks of arguments that several public functions take."""

from __future__ import annotations

from collections.abc import Sequence


def is_count(value: object) -> bool:
    """Whether `value` is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def seed_list(seeds: int | Sequence[int]) -> list[int]:
    """0 … seeds − 1, or the seeds named; ValueError for anything else."""
    if is_count(seeds):
        assert isinstance(seeds, int)
        return list(range(seeds))
    listed = list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else []
    whole = all(isinstance(s, int) and not isinstance(s, bool) for s in listed)
    if not listed or not whole or len(set(listed)) != len(listed):
        raise ValueError(
            f"seeds: {seeds!r} is not a positive integer or a list of different integers"
        )
    return listed


def batch_size_of(batch_size: int | str) -> int | None:
    """Return the rows a forward takes, None for "auto"; ValueError for anything else."""
    if batch_size == "auto":
        return None
    if not is_count(batch_size):
        raise ValueError(f"batch_size: {batch_size!r} is not 'auto' or a positive integer")
    assert isinstance(batch_size, int)
    return batch_size
