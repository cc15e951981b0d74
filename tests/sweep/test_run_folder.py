"""The run folder: what is acknowledged stays, once, whoever writes and whenever they stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prototok.sweep import schema
from prototok.sweep.files import sha256_of
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit


def a_unit(text: str = "t0", length: int = 4) -> Unit:
    return Unit("one-forward", "tiny-llama", "held-out", (text,), (0,), length)


def a_text(text: str = "t0") -> pa.Table:
    row = {"text_id": text, "source": "held-out", "number": 0, "ids": [1, 2, 3, 4], "text": text}
    return pa.Table.from_pylist([row], schema=schema.TEXTS)


def a_run(path: Path, units: list[Unit], experiment: str = "table3") -> RunFolder:
    run = RunFolder.create(path / "run")
    run.add(experiment, {"texts": 1}, units, a_text())
    return run


def save(content: bytes):
    return lambda path: path.write_bytes(content) and None


def test_key_is_of_the_specification_alone() -> None:
    unit = a_unit()
    assert unit.key == Unit.parse(unit.spec()).key
    assert unit == Unit.parse(unit.spec())
    # Any change of this digest orphans every run folder there is.
    assert unit.key == "f77aec6de0b2b45e1d975aee"
    others = {a_unit("t1").key, a_unit(length=5).key, unit.key}
    assert len(others) == 3


def test_commit_is_seen_by_every_reader_and_only_once(tmp_path: Path) -> None:
    unit = a_unit()
    run = a_run(tmp_path, [unit])
    assert run.done() == set() and run.fits().num_rows == 0
    assert run.commit(unit.key, [{"accuracy": 1.0}], save(b"first"))
    assert not run.commit(unit.key, [{"accuracy": 0.5}], save(b"second"))
    again = RunFolder.open(run.path)
    assert again.done() == {unit.key}
    (row,) = again.fits("table3").to_pylist()
    assert row["accuracy"] == 1.0 and row["experiment"] == "table3"
    assert row["tensors_sha256"] == sha256_of(run.tensors_path(unit.key))
    assert [p.name for p in (run.path / "tmp").iterdir()] == ["lock"]


def test_tensors_without_a_shard_are_not_done(tmp_path: Path) -> None:
    unit = a_unit()
    run = a_run(tmp_path, [unit])
    run.tensors_path(unit.key).write_bytes(b"of a process that was killed here")
    assert not run.is_done(unit.key) and run.done() == set()
    assert run.commit(unit.key, [{}], save(b"whole"))
    assert run.tensors_path(unit.key).read_bytes() == b"whole"


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_commit_that_stops_at_any_call_leaves_a_folder_that_can_go_on(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = a_unit()
    run = a_run(tmp_path, [unit])
    calls = 0

    def counted(name: str):
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise InterruptedError
            return real(*arguments)

        return call

    with monkeypatch.context() as patched:
        for name in ("fsync", "replace"):
            patched.setattr(os, name, counted(name))
        try:
            acknowledged = run.commit(unit.key, [{"accuracy": 1.0}], save(b"x"))
        except OSError:
            acknowledged = False
    assert acknowledged == (calls < stop)
    if not run.is_done(unit.key):
        assert not acknowledged
        assert run.commit(unit.key, [{"accuracy": 1.0}], save(b"x"))
    (row,) = run.fits().to_pylist()
    assert row["tensors_sha256"] == sha256_of(run.tensors_path(unit.key))


def test_compacting_keeps_rows_and_what_is_done(tmp_path: Path) -> None:
    units = [a_unit(length=n) for n in (1, 2, 3)]
    run = a_run(tmp_path, units)
    for unit in units[:2]:
        run.commit(unit.key, [{"length": unit.length}], save(b"x"))
    assert run.compact() == {"table3": 2}
    assert list((run.path / "fits").iterdir()) == []
    assert run.done() == {unit.key for unit in units[:2]}
    assert not run.commit(units[0].key, [{}], save(b"y"))
    run.commit(units[2].key, [{"length": 3}], save(b"x"))
    assert sorted(run.fits()["length"].to_pylist()) == [1, 2, 3]
    assert run.compact() == {"table3": 3}
    assert run.compact() == {"table3": 3}
    assert sorted(run.fits("table3")["length"].to_pylist()) == [1, 2, 3]


def test_a_shard_that_survived_its_compaction_is_read_once(tmp_path: Path) -> None:
    unit = a_unit()
    run = a_run(tmp_path, [unit])
    run.commit(unit.key, [{"length": 4}], save(b"x"))
    shard = run.path / "fits" / f"{unit.key}.parquet"
    kept = shard.read_bytes()
    run.compact()
    shard.write_bytes(kept)  # as if the process had been killed between the two
    assert run.fits().num_rows == 1
    assert run.compact() == {"table3": 1} and not shard.exists()


def test_experiments_share_units(tmp_path: Path) -> None:
    run = a_run(tmp_path, [a_unit(), a_unit(length=2)])
    run.add("figure2", {"texts": 2}, [a_unit()], a_text())
    assert list(run.settings()) == ["table3", "figure2"]
    assert len(run.units()) == 2 and run.plan().num_rows == 3
    run.commit(a_unit().key, [{"experiment": "table3"}], save(b"x"))
    assert run.fits("figure2")["experiment"].to_pylist() == ["figure2"]
    assert run.fits()["experiment"].to_pylist() == ["table3"]


def test_planning_again_replaces_the_units_and_keeps_one_of_each_text(tmp_path: Path) -> None:
    run = a_run(tmp_path, [a_unit()])
    run.add("table3", {"texts": 9}, [a_unit(length=3)], pa.concat_tables([a_text(), a_text("t1")]))
    assert run.plan()["length"].to_pylist() == [3]
    assert run.texts()["text_id"].to_pylist() == ["t0", "t1"]


def test_failures_are_forgotten_when_the_unit_is_done(tmp_path: Path) -> None:
    unit = a_unit()
    run = a_run(tmp_path, [unit])
    run.fail(unit.key, "it killed its worker", 3)
    (failure,) = run.failures().to_pylist()
    assert failure["reason"] == "it killed its worker" and failure["attempts"] == 3
    run.commit(unit.key, [{}], save(b"x"))
    assert run.failures().num_rows == 0
    assert list((run.path / "failed").iterdir()) == []


def test_sweeping_up_spares_the_living(tmp_path: Path) -> None:
    run = a_run(tmp_path, [a_unit()])
    mine = run._temporary("k.parquet")
    mine.write_bytes(b"")
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}", ".999999999"))
    dead.write_bytes(b"")
    elsewhere = mine.with_name("k.parquet~00000000.999999999")
    elsewhere.write_bytes(b"")
    assert run.sweep_up() == 1
    assert mine.exists() and elsewhere.exists() and not dead.exists()


def test_foreign_folders_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not a run folder"):
        RunFolder.create(tmp_path)
    with pytest.raises(ValueError, match=r"it has no run\.json"):
        RunFolder.open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    run = a_run(tmp_path / "a", [a_unit()])
    (run.path / "run.json").write_text(json.dumps({"format": "prototok.sweep", "version": 99}))
    with pytest.raises(ValueError, match="format version 1"):
        RunFolder.open(run.path)


def test_shards_read_with_the_tables_own_reader(tmp_path: Path) -> None:
    run = a_run(tmp_path, [a_unit(), a_unit(length=2)])
    for unit in run.units().values():
        run.commit(unit.key, [{"target_ids": [1, 2], "accuracy": 1.0}], save(b"x"))
    table = pq.read_table(run.path / "fits")
    assert table.num_rows == 2
    assert table.schema.equals(schema.FITS)


def test_a_folder_that_was_left_while_it_was_made_can_be_planned_into(tmp_path: Path) -> None:
    """A kill before run.json has its name."""
    for name in ("fits", "tensors", "tmp"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("tmp/lock", "tmp/run.json~0123abcd.999999999", ".trial~0123abcd.0.999999999"):
        (tmp_path / "run" / name).write_text("")
    assert RunFolder.create(tmp_path / "run").settings() == {}
    (tmp_path / "other" / "fits").mkdir(parents=True)
    (tmp_path / "other" / "fits" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not a run folder"):
        RunFolder.create(tmp_path / "other")
