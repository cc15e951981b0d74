"""Texts of a data set one after another, so that files of any size are read: a row is a text.

A row that cannot be read takes its place as `Unreadable`: whoever counts rows counts the same ones.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prototok.common.files import for_arrow
from prototok.common.json import parse_json

SUFFIXES = (".txt", ".jsonl", ".parquet")
_BATCH = 64  # rows of Parquet in memory


@dataclass(frozen=True)
class Unreadable:
    """A row that is no text: why, with its file and place."""

    why: str


def files_of(patterns: Sequence[str], out: Path) -> list[Path]:
    """Return the files that paths and globs name, those of a glob or a folder in order of name.

    Those in the folder `out` are left out: they are what is written of the others.

    Raises:
        ValueError: one of them names no file, or one that ends in none of `SUFFIXES`.
    """
    found: list[Path] = []
    written = out.resolve()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        else:
            names = [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
            files = [Path(name) for name in names if Path(name).is_file()]
        files = [file for file in files if written not in file.resolve().parents]
        if not files:
            raise ValueError(f"source: {pattern} names no file (of {', '.join(SUFFIXES)})")
        found += files
    for path in found:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"source: {path} ends in none of {', '.join(SUFFIXES)}")
    return found


def read_rows(path: Path, column: str) -> Iterator[Any]:
    """Yield each row of a file: a text, token ids, None where it is empty, or `Unreadable`.

    Args:
        path: .txt has a text a line; .jsonl and .parquet have columns.
        column: with strings or lists of token ids.

    Raises:
        ValueError: the file cannot be read, or has no such column.
    """
    reader = {".parquet": _parquet, ".jsonl": _json_lines}.get(path.suffix, _text_lines)
    try:
        yield from reader(path, column)
    except OSError as error:
        raise ValueError(f"source: {path} could not be read ({error.strerror or error})") from None


def _parquet(path: Path, column: str) -> Iterator[Any]:
    try:
        with pq.ParquetFile(for_arrow(path)) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"source: {path} has no column {column!r} (it has {names})")
            kind = file.schema_arrow.field(column).type
            if not (_is_text(kind) or _is_ids(kind)):
                raise ValueError(f"source: column {column!r} of {path} holds {kind}, not text")
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column]):
                yield from batch[column].to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"source: {path} is not Parquet ({error})") from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_ids(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return (lists or pa.types.is_fixed_size_list(kind)) and pa.types.is_integer(kind.value_type)


def _json_lines(path: Path, column: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield parse_json(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                yield Unreadable(f"line {number} of {path} is no JSON with {column!r} ({error!r})")


def _text_lines(path: Path, column: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError:
                yield Unreadable(f"line {number} of {path} is not UTF-8")
