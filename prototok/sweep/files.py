"""Files of a run folder: Parquet, JSON and hashes; none is believed before it is checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prototok.common.files import for_arrow, is_temporary
from prototok.common.json import parse_json


def sha256_of(path: Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FOLDERS = ("fits", "tensors", "failed", "compacted", "tmp")
_OURS = re.compile(r"lock|run\.json~.*")  # in tmp/ while a run is made
_cache: dict[tuple[Path, int, int], set[str]] = {}


def keys_of(path: Path, inode: int, modified: int) -> set[str]:
    """Return the keys in a compacted file, read once for each time it was written."""
    at = (path, inode, modified)
    if at not in _cache:
        _cache[at] = set(read_table(path, ["key"])["key"].to_pylist())
    return _cache[at]


def read_table(
    path: Path, columns: list[str] | None = None, schema: pa.Schema | None = None
) -> pa.Table:
    """Read a whole Parquet file.

    Args:
        path: of the file.
        columns: that are read; None reads all.
        schema: that the file must have.

    Raises:
        ValueError: it is no Parquet file, is damaged, or has other columns.
    """
    try:
        with pq.ParquetFile(for_arrow(path), page_checksum_verification=True) as file:
            if schema is not None and not file.schema_arrow.equals(schema):
                raise ValueError(f"run: {path} has not the columns that it should have")
            return file.read(columns=columns)
    except FileNotFoundError:
        raise  # it may have been compacted meanwhile
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"run: {path} is not a whole Parquet file ({error})") from None


def table_writer(table: pa.Table) -> Callable[[Path], None]:
    """Return what writes the table to a path, with a checksum a page."""
    return lambda path: pq.write_table(
        table, for_arrow(path), compression="zstd", write_page_checksum=True
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError where the file holds something else."""
    try:
        found = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"run: {path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"run: {path} is damaged (it is no JSON object)")
    return found


def dump_json(value: object, path: Path) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def require_inside(folder: Path, names: tuple[str, ...]) -> None:
    """ValueError where something in the folder is a link that leads out of it."""
    home = folder.resolve()
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(f"run: {path} is a link that leads out of the folder")


def require_place(path: Path) -> None:
    """Raise ValueError unless a run may be planned there: a run, an empty folder or nothing.

    A folder is empty, too, that a process was killed in while it made a run, or that one is making.
    """
    if not path.exists() or (path / "run.json").is_file():
        return
    if not path.is_dir() or not all(map(_is_begun, path.iterdir())):
        raise ValueError(f"run: {path} exists and is not a run folder")


def _is_begun(path: Path) -> bool:
    if is_temporary(path):
        return True
    if path.name not in FOLDERS or path.is_symlink() or not path.is_dir():
        return False
    return all(path.name == "tmp" and _OURS.fullmatch(inside.name) for inside in path.iterdir())


class RunNotWritable(OSError):
    """A run folder takes no more, as on a full disk; what is in it stays, and a run goes on."""


class WorkersFailed(RuntimeError):
    """The launcher has no workers to go on with; what was committed stays, and a run goes on."""


@contextlib.contextmanager
def writing(folder: Path, *temporary: Path) -> Iterator[None]:
    """Remove the temporary files of a block that raises.

    Raises:
        RunNotWritable: the system refuses to write.
    """
    try:
        yield
    except BaseException as error:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunNotWritable(
                f"run: {folder} cannot be written any more ({error.strerror or error})"
            ) from error
        raise
