"""The run folder: everything a sweep knows, written so that a kill at any moment loses nothing.

Every file is written whole under `tmp/`, flushed to the disk, renamed to its place, and the folder
it went to is flushed. A unit's tensors are in place before its shard, and the shard is the record
that the unit is done.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from prototok.common.files import flush, host, put, remove_orphans
from prototok.sweep import schema
from prototok.sweep.files import (
    FOLDERS,
    dump_json,
    keys_of,
    read_json,
    read_table,
    require_inside,
    require_place,
    sha256_of,
    table_writer,
    writing,
)
from prototok.sweep.unit import Unit

if TYPE_CHECKING:
    from prototok.results.mem_fit import MemFit
    from prototok.results.proto_tokens import ProtoTokens

_FORMAT = "prototok.sweep"
_NAME, _KEY = re.compile(r"[\w-]{1,64}"), re.compile(r"[0-9a-f]{24}")
_ANY = re.compile(r".*")
_ENTRIES = (*FOLDERS, "run.json", "plan.parquet", "texts.parquet", "analysis", "slurm")


@dataclass(frozen=True)
class RunFolder:
    """One run; many processes on many hosts may have it open."""

    path: Path

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Open the run at `path`, made if it is not there; ValueError where something else is."""
        path = Path(path)
        require_place(path)
        if (path / "run.json").exists():
            return cls.open(path)
        for name in FOLDERS:
            (path / name).mkdir(parents=True, exist_ok=True)
        run = cls(path)
        with run._locked():
            if not (path / "run.json").exists():  # another process may have been faster
                run._write_json({"format": _FORMAT, "version": schema.VERSION, "experiments": {}})
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run that was planned before; ValueError for anything else."""
        path = Path(path)
        if not (path / "run.json").is_file():
            raise ValueError(f"run: {path} is not a run folder (it has no run.json)")
        run = cls(path)
        run._json()
        require_inside(path, _ENTRIES)
        for name in FOLDERS:  # version control and some copies leave empty folders out
            (path / name).mkdir(exist_ok=True)
        return run

    # What was planned.

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings of each planned experiment, in the order they were planned."""
        found: dict[str, dict[str, Any]] = self._json()["experiments"]
        return found

    def plan(self, experiment: str | None = None) -> pa.Table:
        """Read `schema.PLAN`: one row an (experiment, unit), of all or of one experiment."""
        plan = self._table("plan.parquet", schema.PLAN)
        # The first two become names of files.
        for name, pattern in (("key", _KEY), ("experiment", _NAME), ("spec", _ANY)):
            fits = pc.match_substring_regex(plan[name], f"^(?:{pattern.pattern})$")
            if plan[name].null_count or not pc.all(fits, min_count=0).as_py():
                raise ValueError(f"run: {self.path / 'plan.parquet'} has a {name} that is none")
        return plan if experiment is None else plan.filter(pc.equal(plan["experiment"], experiment))

    def texts(self) -> pa.Table:
        """Read `schema.TEXTS`."""
        return self._table("texts.parquet", schema.TEXTS)

    def units(self, experiment: str | None = None) -> dict[str, Unit]:
        """Return every planned unit once, by key, in the order they were planned.

        With `experiment`, those that it planned.
        """
        plan = self.plan(experiment)
        pairs = zip(plan["key"].to_pylist(), plan["spec"].to_pylist(), strict=True)
        try:
            return {key: Unit.parse(spec) for key, spec in pairs}
        except ValueError as error:
            raise ValueError(f"run: {self.path / 'plan.parquet'} is damaged ({error})") from None

    def add(
        self, experiment: str, settings: dict[str, Any], units: Iterable[Unit], texts: pa.Table
    ) -> None:
        """Plan an experiment, replacing what was planned under its name.

        Units that are done stay done, whichever experiment asked for them first. A text that the
        run has already stays as it is, or as long as the longer one.
        """
        rows = [
            {
                "experiment": experiment, "key": unit.key, "mode": unit.mode, "model": unit.model,
                "source": unit.source, "length": unit.length, "share": unit.share,
                "group_size": unit.group_size, "arrangement": unit.arrangement,
                "vectors": unit.vectors, "recipe": unit.recipe, "rows": len(unit.texts),
                "spec": unit.spec(),
            }
            for unit in units
        ]  # fmt: skip
        with self._locked():
            old = self.plan()
            plan = pa.concat_tables(
                [
                    old.filter(pc.not_equal(old["experiment"], experiment)),
                    pa.Table.from_pylist(rows, schema=schema.PLAN),
                ]
            )
            both = pa.concat_tables([self.texts(), texts])
            lengths = pc.list_value_length(both["ids"]).to_pylist()
            kept: dict[str, int] = {}
            for i, text in enumerate(both["text_id"].to_pylist()):
                if text not in kept or lengths[i] > lengths[kept[text]]:
                    kept[text] = i  # in the place of the first
            # Texts before the plan that names them, the list of experiments last.
            rows_kept = pa.array(list(kept.values()), pa.int64())
            self._replace("texts.parquet", table_writer(both.take(rows_kept)))
            self._replace("plan.parquet", table_writer(plan))
            found = self._json()
            found["experiments"][experiment] = settings
            self._write_json(found)

    # What is done.

    def done(self) -> set[str]:
        """Return the keys of the units that are done."""
        # In this order: compaction moves units from the one to the other.
        shards = {e.name[: -len(".parquet")] for e in os.scandir(self.path / "fits")}
        return shards | self._compacted_keys()

    def is_done(self, key: str) -> bool:
        return (self.path / "fits" / f"{key}.parquet").exists() or key in self._compacted_keys()

    def fits(self, experiment: str | None = None) -> pa.Table:
        """Read `schema.FITS`: the rows of every unit that is done.

        With `experiment`, those of the units it planned, and the column says its name.
        """
        wanted = dict.fromkeys(self.plan(experiment)["key"].to_pylist())
        tables = [schema.FITS.empty_table()]
        seen: set[str] = set()
        # Shards first: what compaction takes from here meanwhile is found there.
        for key in wanted:
            with contextlib.suppress(FileNotFoundError):
                tables.append(read_table(self.path / "fits" / f"{key}.parquet", schema=schema.FITS))
                seen.add(key)
        for path in sorted((self.path / "compacted").glob("*.parquet")):
            table = read_table(path, schema=schema.FITS)
            keys = table["key"].to_pylist()
            own = [i for i, key in enumerate(keys) if key in wanted and key not in seen]
            tables.append(table.take(pa.array(own, pa.int64())))
            seen.update(keys[i] for i in own)
        found = pa.concat_tables(tables)
        if experiment is not None:
            name = pa.array([experiment] * len(found), pa.string())
            at = found.schema.get_field_index("experiment")
            found = found.set_column(at, "experiment", name)
        return found

    def shards(self) -> Iterator[tuple[str, Callable[[], pa.Table]]]:
        """Yield (key, what reads its rows) of every planned unit that is done."""
        planned = set(self.plan()["key"].to_pylist())
        seen = set()
        for path in sorted((self.path / "fits").glob("*.parquet")):
            if path.stem in planned:
                seen.add(path.stem)
                yield path.stem, functools.partial(read_table, path, schema=schema.FITS)
        for path in sorted((self.path / "compacted").glob("*.parquet")):
            table = read_table(path, schema=schema.FITS)
            places: dict[str, list[int]] = {}
            for i, key in enumerate(table["key"].to_pylist()):
                places.setdefault(key, []).append(i)
            for key, own in places.items():
                if key in planned - seen:
                    seen.add(key)
                    yield key, functools.partial(table.take, own)

    def tensors_path(self, key: str) -> Path:
        return self.path / "tensors" / f"{key}.safetensors"

    def tensors(self, key: str) -> ProtoTokens | MemFit:
        """Load the vectors of a unit, as its mode stores them."""
        from prototok.results.mem_fit import MemFit
        from prototok.results.proto_tokens import ProtoTokens

        mode = self.units()[key].mode if key in self.units() else None
        if mode is None:
            raise ValueError(f"key: {key!r} is not planned in {self.path}")
        kind = MemFit if mode == "autoregressive" else ProtoTokens
        return kind.load(self.tensors_path(key))

    def commit(self, key: str, rows: list[dict[str, Any]], save: Callable[[Path], None]) -> bool:
        """Record a unit as done; False where another process was first.

        Args:
            rows: `schema.FITS` without key, row and tensors_sha256.
            save: writes the unit's tensors to the path it is given.

        Raises:
            RunNotWritable: the disk is full, or may not be written; nothing is left half written.
        """
        tensors = self._temporary(key + ".safetensors")
        shard = self._temporary(key + ".parquet")
        with writing(self.path, tensors, shard):
            save(tensors)
            flush(tensors)
            sha256 = sha256_of(tensors)
            filled = [
                row | {"key": key, "row": i, "tensors_sha256": sha256} for i, row in enumerate(rows)
            ]
            table_writer(pa.Table.from_pylist(filled, schema=schema.FITS))(shard)
            flush(shard)
            # Alone, because the shard's hash must be that of the tensors beside it.
            with self._locked():
                if self.is_done(key):
                    tensors.unlink()
                    shard.unlink()
                    return False
                os.replace(tensors, self.tensors_path(key))
                flush(self.path / "tensors")
                os.replace(shard, self.path / "fits" / f"{key}.parquet")
                flush(self.path / "fits")
        (self.path / "failed" / f"{key}.json").unlink(missing_ok=True)
        return True

    # What failed.

    def fail(self, key: str, reason: str, attempts: int, traceback: str | None = None) -> None:
        """Record why a unit could not be done."""
        record = {
            "key": key, "reason": reason, "attempts": attempts, "traceback": traceback,
            "time": now().isoformat(),
        }  # fmt: skip
        self._replace(f"failed/{key}.json", lambda path: dump_json(record, path))

    def failures(self) -> pa.Table:
        """Read `schema.FAILED`: planned units that failed and were not done since."""
        done, planned = self.done(), set(self.plan()["key"].to_pylist())
        records = []
        for path in sorted((self.path / "failed").glob("*.json")):
            if path.stem in planned - done:
                record = read_json(path)
                try:
                    record["time"] = datetime.datetime.fromisoformat(record["time"])
                    records += pa.Table.from_pylist([record], schema=schema.FAILED).to_pylist()
                except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
                    raise ValueError(f"run: {path} is damaged ({error})") from None
        return pa.Table.from_pylist(records, schema=schema.FAILED)

    def forget_failures(self, keys: Iterable[str]) -> None:
        """Let units that failed be tried again."""
        for key in keys:
            (self.path / "failed" / f"{key}.json").unlink(missing_ok=True)

    # Upkeep.

    def sweep_up(self) -> int:
        """Remove what dead processes of this host left in tmp/; return how many files."""
        return remove_orphans(self.path / "tmp")

    def compact(self) -> dict[str, int]:
        """Merge shards into one file an experiment; return its rows by experiment.

        The merged file is in place and read back before the first shard it replaces is removed, and
        its rows then are the record that their units are done.
        """
        merged = {}
        first: dict[str, str] = {}
        plan = self.plan()
        for name, key in zip(plan["experiment"].to_pylist(), plan["key"].to_pylist(), strict=True):
            first.setdefault(key, name)
        with self._locked():
            for experiment in dict.fromkeys(first.values()):
                path = self.path / "compacted" / f"{experiment}.parquet"
                tables = [read_table(path, schema=schema.FITS)] if path.exists() else []
                known = set(tables[0]["key"].to_pylist()) if tables else set()
                shards = {
                    key: self.path / "fits" / f"{key}.parquet"
                    for key, name in first.items()
                    if name == experiment
                }
                shards = {key: shard for key, shard in shards.items() if shard.exists()}
                new = [shard for key, shard in shards.items() if key not in known]
                tables += [read_table(shard, schema=schema.FITS) for shard in new]
                if not tables:
                    continue
                table = pa.concat_tables(tables)
                if shards:
                    self._replace(f"compacted/{experiment}.parquet", table_writer(table))
                    back = read_table(path, ["key"])["key"].to_pylist()
                    if not set(shards) <= set(back):
                        raise RuntimeError(f"run: {path} lacks units that were just written to it")
                    for shard in shards.values():
                        shard.unlink()
                    flush(self.path / "fits")
                merged[experiment] = len(table)
        return merged

    # Files.

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process in at a time; the lock goes with the process that holds it."""
        # Neither emptied nor followed: what stands there may be a link to a user's file.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self.path / "tmp" / "lock", flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _compacted_keys(self) -> set[str]:
        keys: set[str] = set()
        for path in (self.path / "compacted").glob("*.parquet"):
            stat = path.stat()
            keys |= keys_of(path, stat.st_ino, stat.st_mtime_ns)
        return keys

    def _temporary(self, name: str) -> Path:
        """Return a path in tmp/ that no other process uses, and where nothing is."""
        path = self.path / "tmp" / f"{name}~{host()}.{os.getpid()}"
        path.unlink(missing_ok=True)  # of a dead process that had our number
        return path

    def _replace(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file of this folder so that it is there whole or not at all."""
        target = self.path / name
        temporary = self._temporary(target.name)
        with writing(self.path, temporary):
            write(temporary)
            put(temporary, target)

    def _json(self) -> dict[str, Any]:
        found = read_json(self.path / "run.json")
        if found.get("format") != _FORMAT or found.get("version") != schema.VERSION:
            raise ValueError(
                f"run: {self.path / 'run.json'} is not of a sweep of format version "
                f"{schema.VERSION}"
            )
        planned: Any = found.get("experiments")
        is_dict = isinstance(planned, dict) and all(isinstance(v, dict) for v in planned.values())
        if not is_dict or not all(map(_NAME.fullmatch, planned)):
            raise ValueError(f"run: {self.path / 'run.json'} is damaged (its experiments)")
        return found

    def _write_json(self, value: dict[str, Any]) -> None:
        self._replace("run.json", lambda path: dump_json(value, path))

    def _table(self, name: str, empty: pa.Schema) -> pa.Table:
        path = self.path / name
        return read_table(path, schema=empty) if path.exists() else empty.empty_table()


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
