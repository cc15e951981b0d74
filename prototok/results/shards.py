"""The folder of a fit of any number of texts: shards, each there whole or not at all.

    F/fit.json                              what is fitted, and how
    F/00000012/proto_tokens.safetensors     shard 12: the vectors of its texts
    F/00000012/fits.parquet                 its records, one row a (text, seed)
    F/00000012/shard.json                   the record that it is done, written last
    F/summary.json                          totals, written when the texts had ended

A shard is a fit like any other: `FitResult.load`, `prototok decode` and `prototok export` read it.
Nothing else in F is ever touched. Letters: T texts of a shard that were fitted, S seeds, K leading
vectors, d hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prototok.common.arguments import is_integer
from prototok.common.files import flush, for_arrow, remove_orphans, write_text
from prototok.common.json import parse_json
from prototok.results.fit_result import FitResult
from prototok.results.unfinished import (
    Unfinished,
    is_left_over,
    remove_files,
    require_one_of,
    require_same,
)

_FORM = ("prototok.shards", 1)
_TOKENS, _FITS, _RECORD, _SUMMARY = (
    "proto_tokens.safetensors", "fits.parquet", "shard.json", "summary.json",
)  # fmt: skip
_COUNTS = ("first", "texts", "exact", "failed", "steps")


@dataclass(frozen=True)
class ShardRecord:
    """What a shard says of itself; texts are numbered from 0 in the order in which they came.

    first    number of its first text; texts: how many it has, refused ones included
    exact    texts that came back whole, from one seed at least
    failed   fits that ended because a loss or a gradient was not finite
    steps    updates of all its fits
    input    hash of the token ids of its texts, to tell them from others
    refused  (number, why) of texts that could not be fitted, such as empty ones
    """

    first: int
    texts: int
    exact: int
    failed: int
    steps: int
    input: str
    refused: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class StreamSummary:
    """Totals of a fit of many texts: `texts` that came, `shards` they are in; the rest as there."""

    texts: int
    shards: int
    exact: int
    failed: int
    refused: int
    steps: int


@dataclass(frozen=True)
class Shard:
    """One shard: its number, its folder and its record. Vectors and records are read when asked."""

    number: int
    folder: Path
    record: ShardRecord

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Map the vectors to memory: e (T, S, d) or (T, S, K, d), m (T, S, d), fp32.

        They are read from the disk as they are used. Row s of text t is row t · S + s of `records`.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = self.folder / _TOKENS
        if not self._has_fits:
            return {}
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in ("e", "m") if name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"shards: {path} could not be read ({error})") from None

    @property
    def records(self) -> pa.Table:
        """Read the records, one row a (text, seed): those of a fit, and

        * `number`: of the text among all that came, from 0,
        * `text_id`: a hash of its token ids, the same for equal texts,
        * `prefix`: ids of the tokens in front of e; null where nothing is, or vectors.

        Raises:
            ValueError: the file is missing or damaged.
        """
        if not self._has_fits:
            return pa.table({})
        path = self.folder / _FITS
        try:
            with pq.ParquetFile(for_arrow(path), page_checksum_verification=True) as file:
                return file.read()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"shards: {path} could not be read ({error})") from None

    def load(self) -> FitResult:
        """Read the shard into memory, every file checked; ValueError where none was fitted."""
        if not self._has_fits:
            raise ValueError(f"shards: no text of shard {self.number} was fitted")
        return FitResult.load(self.folder)

    @property
    def _has_fits(self) -> bool:
        return len(self.record.refused) < self.record.texts


class Shards(Sequence[Shard]):
    """The shards of a folder that `fit_stream` or `prototok dataset` writes, in their order.

    `complete` is True if the texts had ended; while they are fitted it shows what is done so far.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder; nothing but its list of shards is read.

        Raises:
            ValueError: the folder is none of `fit_stream`, or a record in it is damaged.
        """
        self.folder = Path(folder)
        kept = _kept(self.folder)
        if not kept.is_there():
            raise ValueError(f"shards: {folder} holds no shards (it has no fit.json)")
        self.plan = kept.plan()
        self.complete = (self.folder / _SUMMARY).is_file()
        self._shards = [Shard(int(p.name), p, _read(p)) for p in kept.parts() if _is_whole(p)]

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}, {self.summary()})"

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, i: Any) -> Any:
        return self._shards[i]

    def summary(self) -> StreamSummary:
        """Return the totals of all shards."""
        records = [shard.record for shard in self]
        total = {name: sum(getattr(r, name) for r in records) for name in _COUNTS[1:]}
        return StreamSummary(
            shards=len(self), refused=sum(len(r.refused) for r in records), **total
        )

    def refused(self) -> Iterator[tuple[int, str]]:
        """Yield (number, why) of every text that could not be fitted."""
        for shard in self:
            yield from shard.record.refused


@dataclass(frozen=True)
class ShardFolder:
    """A fit on its way to shards; `resume` and `overwrite` are what the user allowed."""

    path: Path
    resume: bool = False
    overwrite: bool = False

    @contextlib.contextmanager
    def claimed(self) -> Iterator[ShardFolder]:
        """Make the folder, keep others out and try to write there, before the work.

        A block that raises before a shard was kept leaves the folder as it was.

        Raises:
            ValueError: the folder cannot be written, another process is at it, or it holds what may
                not be replaced.
        """
        require_one_of(self.resume, self.overwrite)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: {self.path} is a file")
        with _kept(self.path).claimed(self.path, self._require_free, self.done):
            remove_orphans(self.path)
            yield self

    def _require_free(self) -> None:
        """Raise ValueError where something is that may not be replaced."""
        kept = _kept(self.path)
        if not kept.is_there():
            if not is_left_over(self.path):
                raise ValueError(f"out: {self.path} exists and holds something else than shards")
        elif not (self.resume or self.overwrite):
            raise ValueError(
                f"out: {self.path} holds {len(self.done())} shards; give --resume to go on or "
                "--overwrite to start again"
            )

    def begin(self, plan: dict[str, Any]) -> None:
        """Go on with the shards that are there; from here on the folder is of this fit.

        Args:
            plan: everything that the result depends on beside the texts.

        Raises:
            ValueError: what is to be resumed is another fit, or is damaged.
        """
        kept = _kept(self.path)
        if kept.is_there() and not self.overwrite:
            require_same(kept.plan(), plan, self.path)
        if self.overwrite:
            (self.path / _SUMMARY).unlink(missing_ok=True)
            kept.empty()
        kept.begin(plan)
        for part in kept.parts():
            if _is_whole(part):
                remove_orphans(part)
            else:
                _remove(part)  # a process died before its record

    def done(self) -> list[int]:
        """Return the numbers of the shards that are there."""
        kept = _kept(self.path)
        return [int(p.name) for p in kept.parts() if _is_whole(p)] if kept.is_there() else []

    def require_same(self, number: int, texts: int, digest: str) -> bool:
        """Return True if a shard is there already, False where it is not.

        Raises:
            ValueError: it is there, of other texts than those of this hash.
        """
        part = _kept(self.path).part(number)
        if not _is_whole(part):
            return False
        record = _read(part)
        if (record.texts, record.input) != (texts, digest):
            raise ValueError(
                f"resume: {self.path} holds a fit of other texts, or fewer, from shard {number} on "
                f"(text {record.first}); give --overwrite to start again"
            )
        return True

    def commit(
        self, number: int, record: ShardRecord, result: FitResult | None,
        columns: Mapping[str, Sequence | pa.Array],
    ) -> None:  # fmt: skip
        """Keep a shard that has ended; when this returns it is on the disk.

        Args:
            number: of the shard.
            record: what it says of itself.
            result: its fits; None where every text was refused.
            columns: what its records say beside what a fit's do, a value a (text, seed).

        Raises:
            OSError: it cannot be written, as on a full disk; nothing of it is left.
        """
        part = _kept(self.path).part(number)
        try:
            (self.path / _SUMMARY).unlink(missing_ok=True)  # of a fit that had fewer texts
            part.mkdir(exist_ok=True)
            if result is not None:
                result.save(part, overwrite=True, columns=columns)
            write_text(part / _RECORD, json.dumps(dataclasses.asdict(record)) + "\n")
            flush(self.path)
        except BaseException:
            _remove(part)
            raise

    def finish(self) -> StreamSummary:
        """Write the totals down, and return them: the texts have ended."""
        summary = Shards(self.path).summary()
        write_text(self.path / _SUMMARY, json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
        return summary


def _kept(folder: Path) -> Unfinished:
    return Unfinished(folder, folder, _FORM, _remove)


def _is_whole(part: Path) -> bool:
    return (part / _RECORD).is_file()


def _remove(part: Path) -> None:
    """Remove a shard, its record first: without it the rest counts for nothing."""
    remove_files(part, (_RECORD, _FITS, _TOKENS))


def _read(part: Path) -> ShardRecord:
    """Read a shard's record; ValueError for anything else."""
    path = part / _RECORD
    try:
        found = parse_json(path.read_bytes())
        counts = {name: found[name] for name in _COUNTS}
        refused = tuple((number, why) for number, why in found["refused"])
        record = ShardRecord(**counts, input=found["input"], refused=refused)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"shards: {path} is damaged ({error!r})") from None
    numbers = [*counts.values(), *(number for number, _ in refused)]
    texts = [record.input, *(why for _, why in refused)]
    good = all(is_integer(n) and n >= 0 for n in numbers) and all(isinstance(t, str) for t in texts)
    if not good or len(refused) > record.texts:
        raise ValueError(f"shards: {path} is damaged (it counts what cannot be)")
    return record
