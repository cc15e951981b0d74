"""Checks of arguments that several public functions take."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard


def is_integer(value: object) -> TypeGuard[int]:
    """Return True for an int or what stands for one, such as np.int64; False for a truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Return True if `value` is a positive integer."""
    return is_integer(value) and value >= 1


def seed_list(seeds: int | Sequence[int]) -> list[int]:
    """Return 0 … seeds − 1, or the seeds named; ValueError for anything else."""
    if is_count(seeds):
        return list(range(seeds))
    listed = None if isinstance(seeds, str) else listed_items(seeds)
    if not listed or not all(map(is_integer, listed)) or len(set(listed)) != len(listed):
        raise ValueError(
            f"seeds: {seeds!r} is not a positive integer or a list of different integers"
        )
    return [int(seed) for seed in listed]


def listed_items(values: Any) -> list[Any] | None:
    """Return the items of a sequence or of a column of numpy, pandas, Arrow or polars; else None.

    None of these libraries is imported for it.
    """
    if isinstance(values, Sequence):
        return list(values)
    for name in ("to_pylist", "to_list", "tolist"):
        method = getattr(values, name, None)
        if callable(method):
            found = method()
            return found if isinstance(found, list) else None
    return None


def batch_size_of(batch_size: object) -> int | None:
    """Return the rows a forward takes, None for "auto"; ValueError for anything else."""
    if isinstance(batch_size, str) and batch_size == "auto":
        return None
    if not is_count(batch_size):
        raise ValueError(f"batch_size: {batch_size!r} is not 'auto' or a positive integer")
    return int(batch_size)  # type: ignore[call-overload]
