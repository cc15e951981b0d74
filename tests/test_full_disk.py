"""A disk that is really full, and one that may not be written: one sentence, and nothing is lost.

The disk is a tmpfs of a few MB, filled but for what each case needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

import prototok
from prototok import FitResult
from prototok.cli import main
from prototok.common.files import is_temporary
from prototok.fitting.prior import Prior
from prototok.report import build as report_build
from prototok.report.build import build
from prototok.report.results import read
from prototok.results.fit_folder import FitFolder
from prototok.results.shards import ShardFolder, Shards
from prototok.sweep import schema
from prototok.sweep.files import RunNotWritable
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit
from report import made_up
from small_disk import fill, read_only, small_disk
from support import small_llama

BOOK = (Path(prototok.__file__).parent / "models/tiny-llama/held_out.txt").read_text()[:400]
PAGE = 1 << 12  # what a file of any size takes on a tmpfs


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small disk that the test stands in; the book is elsewhere."""
    (tmp_path / "book.txt").write_text(BOOK)
    with small_disk(tmp_path / "disk") as disk:
        monkeypatch.chdir(disk)
        yield disk
        monkeypatch.chdir(tmp_path)


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def fit(*arguments: str) -> int:
    return cli("fit", "../book.txt", "-o", "F", "--length", "1", "--limit", "6", *arguments)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "filler"
    }  # fmt: skip


def no_half_written(folder: Path) -> bool:
    return not any(is_temporary(path) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def savers() -> dict[str, Callable[[Path], object]]:
    """Everything of ours that is saved."""
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    recipe = prototok.Recipe(max_steps=1)
    made = prototok.fast_fit(lm, [[3, 4, 5], [6, 7]], seeds=20, recipe=recipe, progress=False)
    mem = prototok.autoregressive.fit(lm, [[3, 4]], seeds=20, recipe=recipe, progress=False)
    d = lm.hidden_size
    prior = Prior(torch.zeros(2, d), torch.ones(2, d), torch.zeros(2, d, d), lm.identity)
    return {
        "fit": made.save, "tokens": made.tokens.save, "mem": mem.save, "prior": prior.save,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["fit", "tokens", "mem", "prior"])
@pytest.mark.parametrize("room", [0, 1])
def test_a_save_that_finds_the_disk_full_leaves_what_was_there(
    kind: str, room: int, disk: Path, savers: dict[str, Callable[[Path], object]]
) -> None:
    filler = fill(disk, leave=room * PAGE)
    with pytest.raises(OSError, match="(?i)space|cannot be written"):
        savers[kind](disk / "new" / "a")
    assert tree(disk) == {}
    filler.unlink()
    savers[kind](disk / "a")
    before = tree(disk)
    fill(disk, leave=room * PAGE)
    with pytest.raises(OSError, match="(?i)space|cannot be written"):
        savers[kind](disk / "a")
    assert tree(disk) == before


def test_a_fit_stops_with_what_it_kept_and_goes_on(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real, kept = FitFolder.commit, []

    def commit(self: FitFolder, text: int, result: FitResult) -> None:
        if len(kept) == 3:
            fill(disk, leave=2 * PAGE)
        real(self, text, result)
        kept.append(text)

    with monkeypatch.context() as patched:
        patched.setattr(FitFolder, "commit", commit)
        assert fit() == 3
    said = capsys.readouterr().err
    assert "out: F cannot be written any more (" in said
    assert "3 of 6 chunks are in it, and --resume goes on from there" in said
    assert no_half_written(disk)
    (disk / "filler").unlink()
    assert fit("--resume") == 0
    assert FitResult.load("F").tokens.texts == 6
    assert sorted(os.listdir()) == ["F"]


def test_shards_stop_at_a_full_disk_and_go_on(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (disk.parent / "lines.txt").write_text("a\nb\nc\nd\ne\n")
    command = ["dataset", "../lines.txt", "-o", "F", "--length", "1", "--shard", "2"]
    real, kept = ShardFolder.commit, []

    def commit(self: ShardFolder, number: int, *rest: object) -> None:
        if number == 1:
            fill(disk, leave=2 * PAGE)
        real(self, number, *rest)  # type: ignore[arg-type]
        kept.append(number)

    with monkeypatch.context() as patched:
        patched.setattr(ShardFolder, "commit", commit)
        assert cli(*command) == 3
    said = capsys.readouterr().err
    assert "out: F cannot be written any more (" in said and said.count("\n") == 1
    assert "; 1 shards are in it, and --resume goes on from there" in said
    assert no_half_written(disk)
    assert sorted(os.listdir("F")) == ["00000000", "fit.json"]
    (disk / "filler").unlink()
    assert cli(*command, "--resume") == 0
    assert Shards("F").summary().texts == 5


def test_what_is_full_from_the_start_is_told_before_the_model_loads(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    RunFolder.create("run").add("table3", {}, [UNIT], schema.TEXTS.empty_table())
    fill(disk)
    before = tree(disk)
    monkeypatch.setattr("prototok.model.load.load", None)
    monkeypatch.setattr("prototok.sweep.local.run_local", None)
    for command in (
        ("fit", "../book.txt", "-o", "F"), ("capacity", "../book.txt", "-o", "c.csv"),
        ("dataset", "../book.txt", "-o", "D"), ("sweep", "run", "run"),
        ("sweep", "plan", "table3", "-o", "R", "--preset", "small"),
        ("bench", "-o", "b.json"), ("profile", "--trace", "t.json"),
        ("report", "run", "-o", "r.html"),
    ):  # fmt: skip
        assert cli(*command) == 2, command
        said = capsys.readouterr().err
        assert "cannot be written (No space left on device)" in said and said.count("\n") == 1
    assert tree(disk) == before


def test_a_measurement_of_capacity_stops_and_goes_on(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("prototok.fitting.capacity_file.GRID", (1, 2))
    command = ["capacity", "../book.txt", "-o", "c.csv", "--texts", "3", "--longest", "4"]
    from prototok.fitting import capacity_file

    real, kept = capacity_file.CapacityFile.keep, []

    def keep(self: object, growth: object, lm: object) -> None:
        if len(kept) == 4:
            fill(disk)
        real(self, growth, lm)  # type: ignore[arg-type]
        kept.append(growth)

    with monkeypatch.context() as patched:
        patched.setattr(capacity_file.CapacityFile, "keep", keep)
        assert cli(*command) == 3
    assert "c.csv cannot be written any more (" in capsys.readouterr().err
    assert no_half_written(disk)
    (disk / "filler").unlink()
    assert cli(*command, "--resume") == 0
    assert sorted(os.listdir()) == ["c.csv"]


UNIT = Unit("one-forward", "tiny-llama", "held-out", ("t0",), (0,), 4)


def test_a_commit_that_finds_the_disk_full_leaves_the_run_as_it_was(disk: Path) -> None:
    run = RunFolder.create(disk / "run")
    run.add("table3", {}, [UNIT], schema.TEXTS.empty_table())
    before = tree(disk)
    for room in range(3):
        filler = fill(disk, leave=room * PAGE)
        with pytest.raises(RunNotWritable, match="^run: .*No space left on device"):
            run.commit(UNIT.key, [{}], lambda path: path.write_bytes(bytes(2 * PAGE)) and None)
        with pytest.raises(RunNotWritable):
            fill(disk)
            run.fail(UNIT.key, "no reason", 1)
        assert tree(disk) == before
        filler.unlink()
    assert run.commit(UNIT.key, [{}], lambda path: path.write_bytes(b"x") and None)


def test_a_compaction_that_finds_the_disk_full_loses_no_shard(disk: Path) -> None:
    run = RunFolder.create(disk / "run")
    run.add("table3", {}, [UNIT], schema.TEXTS.empty_table())
    run.commit(UNIT.key, [{"length": 4}], lambda path: path.write_bytes(b"x") and None)
    before = tree(disk)
    fill(disk)
    assert cli("sweep", "compact", "run") == 2
    assert tree(disk) == before
    assert run.fits().num_rows == 1


def test_a_sweep_stops_and_goes_on_and_blames_no_unit(
    disk: Path, capsys: pytest.CaptureFixture
) -> None:
    """A real worker in a process of its own meets the full disk."""
    (disk / "c.yaml").write_text("sources: random\nlengths: [1]\ntexts: 8\nshare: none\n")
    plan = ("sweep", "plan", "table3", "--preset", "small", "--config", "c.yaml", "-o", "run")
    assert cli(*plan, "--model", "tiny-llama") == 0
    run = RunFolder.open("run")
    assert len(run.units()) == 8
    # Room for the trial of the place, and for a few units.
    filler = fill(disk, leave=1 << 17)
    assert cli("sweep", "run", "run", "--workers", "1", "--device", "cpu") == 3
    said = capsys.readouterr().err
    done = run.done()
    assert f"No space left on device); {len(done)} units are done, and running it again" in said
    assert 0 < len(done) < 8 and run.failures().num_rows == 0
    assert os.listdir("run/tmp") == ["lock"]
    filler.unlink()
    assert cli("sweep", "run", "run", "--workers", "1", "--device", "cpu") == 0
    assert run.done() == set(run.units()) and run.fits().num_rows == 8
    assert done <= run.done()


def test_a_report_that_finds_the_disk_full_leaves_the_earlier_one(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = read(made_up.RunFolder.create(tmp_path / "run").path)
    build(results, Path("r.html"), browser="none")
    before = tree(disk)
    real, kept = report_build.write_text, []

    def write_text(path: Path, text: str) -> None:
        if len(kept) == 3:
            fill(disk)
        real(path, text)
        kept.append(path)

    monkeypatch.setattr(report_build, "write_text", write_text)
    with pytest.raises(OSError, match="No space left on device"):
        build(results, Path("r.html"), browser="none")
    monkeypatch.undo()
    monkeypatch.chdir(disk)
    after = tree(disk)
    assert after.keys() == before.keys() and no_half_written(disk)
    assert all(content for content in after.values())
    (disk / "filler").unlink()
    build(results, Path("r.html"), browser="none")
    assert tree(disk) == before


def test_what_may_not_be_written_is_told_and_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    (tmp_path / "book.txt").write_text(BOOK)
    assert fit() == 0
    run = RunFolder.create("run")
    text = {"text_id": "t0", "source": "held-out", "number": 0, "ids": [1, 2, 3, 4], "text": "a"}
    table = pa.Table.from_pylist([text], schema=schema.TEXTS)
    run.add("table3", {}, [UNIT], table)
    before = tree(home)
    monkeypatch.setattr("prototok.sweep.local.run_local", None)
    monkeypatch.chdir(tmp_path)
    with read_only(home):
        monkeypatch.chdir(home)  # not before, as that would be below the mount
        for command in (
            ("fit", "../book.txt", "-o", "F", "--overwrite"), ("fit", "../book.txt", "-o", "G"),
            ("capacity", "../book.txt", "-o", "c.csv"), ("sweep", "run", "run"),
            ("dataset", "../book.txt", "-o", "D"),
            ("sweep", "plan", "table3", "-o", "R", "--preset", "small"), ("bench", "-o", "b.json"),
            ("profile", "--trace", "t.json"), ("report", "run", "-o", "r.html"),
            ("decode", "F", "--out", "d.txt"), ("sweep", "compact", "run"),
        ):  # fmt: skip
            capsys.readouterr()
            assert cli(*command) == 2, command
            said = capsys.readouterr().err
            assert "Read-only file system" in said and said.count("\n") == 1, command
        assert cli("decode", "F") == 0
        assert cli("sweep", "status", "run") == 0
        assert cli("report", "run", "-o", str(tmp_path / "r.html")) == 0
        assert FitResult.load("F").tokens.texts == 6
        monkeypatch.chdir(tmp_path)
    assert tree(home) == before
