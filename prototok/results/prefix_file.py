"""How a constant prefix is kept in a safetensors file: its vectors, and its ids in the header.

A file without a prefix says nothing of one, as before there were any; a reader from then refuses
the tensor that it does not know.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prototok.model.prefix import Prefix

NAME = "prefix"
_IDS = "prefix_ids"


def prefix_tensors(prefix: Prefix | None) -> dict[str, Tensor | None]:
    """Return what goes beside the other tensors of a file."""
    return {NAME: None if prefix is None else prefix.vectors}


def prefix_header(prefix: Prefix | None) -> dict[str, list[int]]:
    """Return what goes into a file's header."""
    return {} if prefix is None or prefix.ids is None else {_IDS: list(prefix.ids)}


def require_prefix(header: dict[str, Any], shapes: dict[str, Any], width: int, words: int) -> None:
    """Check the prefix of a file, (dtype, shape) by tensor, against d = `width` and V = `words`.

    Raises ValueError for vectors of another width, and for ids that are not one a vector.
    """
    dtype, shape = shapes.get(NAME, ("F32", (0, width)))
    if dtype != "F32" or len(shape) != 2 or shape[1] != width or (NAME in shapes and not shape[0]):
        raise ValueError(f"prefix is {dtype} {tuple(shape)} where F32 (P, {width}) is expected")
    ids = header.get(_IDS)
    if ids is None:
        return
    if not isinstance(ids, list) or len(ids) != shape[0]:
        raise ValueError("prefix_ids are not one for each vector of the prefix")
    if not all(type(token) is int and 0 <= token < words for token in ids):
        raise ValueError("prefix_ids are not all tokens of its model")


def prefix_in(header: dict[str, Any], tensors: dict[str, Tensor]) -> Prefix | None:
    """Return the prefix that a file holds; None where it holds none."""
    if NAME not in tensors:
        return None
    ids = header.get(_IDS)
    return Prefix(tensors[NAME], None if ids is None else tuple(ids))
