"""Files of a run folder: Parquet, JSON and hashes, flushed to the disk."""

from __future__ import annotations

import hashlib
import json
import os
import socket
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


def flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def host() -> str:
    """Return a short name of this host that does not give it away."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Return True if a process of this host has that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
