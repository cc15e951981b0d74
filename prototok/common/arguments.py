"""Checks of arguments that several public functions take."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard


def is_integer(value: object) -> TypeGuard[int]:
    """Return True for an int or what stands for one, such as np.int64; False for a truth value.

    Also False for one that 64 bits do not hold: neither tensors nor columns could take it.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return -(1 << 63) <= int(value) < 1 << 63


def is_number(value: object) -> TypeGuard[float]:
    """Return True for a finite real number; False for a truth value, or a huge integer."""
    if isinstance(value, numbers.Integral):
        return is_integer(value)
    return isinstance(value, numbers.Real) and math.isfinite(value)


def is_betas(value: object) -> TypeGuard[tuple[float, float]]:
    """Return True for two numbers in [0, 1), as AdamW takes them."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(is_number(beta) and 0 <= beta < 1 for beta in value)


def plain_number(value: float) -> float:
    """Return Python's own int or float of what stands for one, such as np.float32."""
    return int(value) if is_integer(value) else float(value)


def is_count(value: object) -> TypeGuard[int]:
    """Return True if `value` is a positive integer."""
    return is_integer(value) and value >= 1


def is_unicode(text: str) -> bool:
    """Return False for text with half of a surrogate pair, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_seed(seed: object) -> None:
    """Raise ValueError unless `seed` is one that a generator takes."""
    if not is_integer(seed):
        raise ValueError(f"seed: {seed!r} is not a 64-bit integer")


def require_callable(**given: object) -> None:
    """Raise ValueError where what would be called later on, if not None, cannot be."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ValueError(f"{name}: {value!r} cannot be called")


def nearest(value: object, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant, in any case; None where none is near."""
    names = {one.lower(): one for one in known}
    found = difflib.get_close_matches(str(value)[:200].lower(), list(names), n=1, cutoff=0.6)
    return names[found[0]] if found else None


def hint(value: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'fast'?" for the end of a message; nothing where none is near."""
    found = nearest(value, known) if isinstance(value, str) else None
    return f"; did you mean {found!r}?" if found else ""


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
