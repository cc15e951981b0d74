"""Files of a run folder: Parquet, JSON and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def sha256_of(path: Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_cache: dict[tuple[Path, int, int], set[str]] = {}


def keys_of(path: Path, inode: int, modified: int) -> set[str]:
    """Return the keys in a compacted file, read once for each time it was written."""
    at = (path, inode, modified)
    if at not in _cache:
        _cache[at] = set(pq.ParquetFile(path).read(columns=["key"])["key"].to_pylist())
    return _cache[at]


def read_table(path: Path) -> pa.Table:
    """Read a whole Parquet file; ValueError where it is none."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except pa.ArrowException as error:
        raise ValueError(f"run: {path} is not a whole Parquet file ({error})") from None


def table_writer(table: pa.Table) -> Callable[[Path], None]:
    """Return what writes the table to a path."""
    return lambda path: pq.write_table(table, path, compression="zstd")


def dump_json(value: object, path: Path) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
