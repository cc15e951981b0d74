"""The clock set back, or ahead: what is kept does not depend on the time of day.

Nothing of ours asks how old a file is, or what time it is, but to write a date down.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import prototok
from prototok import FitResult
from prototok.cli import main
from prototok.results.fit_folder import FitFolder
from prototok.sweep import run_folder, schema
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit
from report import made_up

DAY = 24 * 3600
BOOK = (Path(prototok.__file__).parent / "models/tiny-llama/held_out.txt").read_text()[:90]

# For a process of its own: each look at the clock says an hour less than the one before.
BACKWARDS = """
import time
real, looks = time.time_ns, iter(range(10**9))
time.time_ns = lambda: real() - 3600 * 10**9 * next(looks)
time.time = lambda: time.time_ns() / 1e9
"""


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def turn(folder: Path, seconds: float) -> None:
    """Date all files as a clock would have that was wrong by so much when they were written."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + seconds, time.time() + seconds), follow_symlinks=False)


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each look at the clock in this process say an hour less than the one before."""
    begun, looks = time.time(), iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: begun - 3600 * next(looks))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_fit_goes_on_whatever_the_dates_of_its_files(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(BOOK)
    command = ["fit", "book.txt", "-o", "F", "--length", "1", "--limit", "4", "--device", "cpu"]
    real, kept = FitFolder.commit, []

    def commit(self: FitFolder, text: int, result: FitResult) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        real(self, text, result)
        kept.append(text)

    with monkeypatch.context() as patched:
        patched.setattr(FitFolder, "commit", commit)
        assert cli(*command) == 130
    turn(tmp_path, seconds)
    before = {text: FitResult.load(f"F/unfinished/{text:08d}").tokens.e for text in kept}
    with monkeypatch.context() as patched:
        backwards(patched)
        assert cli(*command, "--resume") == 0
    result = FitResult.load("F")
    assert result.tokens.texts == 4 and (result.seconds > 0).all()
    assert all((result.tokens.e[text] == e[0]).all() for text, e in before.items())
    assert sorted(os.listdir("F")) == ["fits.parquet", "proto_tokens.safetensors"]


def a_run(folder: Path, units: list[Unit]) -> RunFolder:
    text = {"text_id": "t0", "source": "held-out", "number": 0, "ids": [5, 6, 7], "text": "a"}
    run = RunFolder.create(folder)
    run.add("table3", {}, units, pa.Table.from_pylist([text], schema=schema.TEXTS))
    return run


def units() -> list[Unit]:
    return [Unit("one-forward", "tiny-llama", "held-out", ("t0",), (0,), n) for n in (1, 2, 3)]


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_run_folder_is_read_whatever_the_dates_of_its_files(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits, compactions and failures made before and after the clock was set."""
    run = a_run(tmp_path / "run", units())
    save: Callable[[Path], None] = lambda path: path.write_bytes(b"x") and None  # noqa: E731
    keys = list(run.units())
    assert run.commit(keys[0], [{"length": 1}], save) and run.compact() == {"table3": 1}
    assert run.done() == {keys[0]}
    run.fail(keys[1], "because", 1)
    turn(tmp_path, seconds)
    moved = run_folder.now() - datetime.timedelta(seconds=seconds)
    monkeypatch.setattr(run_folder, "now", lambda: moved)
    backwards(monkeypatch)
    orphan = run.path / "tmp" / f"k.parquet~{run_folder.host()}.999999999"
    mine = run._temporary("k.parquet")
    for path in (orphan, mine):
        path.write_bytes(b"")
    assert run.sweep_up() == 1 and mine.exists()  # by the process, not by its age
    mine.unlink()
    assert not run.commit(keys[0], [{"length": 1}], save)
    assert run.commit(keys[1], [{"length": 2}], save) and run.failures().num_rows == 0
    run.fail(keys[2], "because", 1)
    # Compacted twice within one tick of a clock that stands still, too.
    assert run.compact() == {"table3": 2}
    (path,) = (run.path / "compacted").iterdir()
    stat = path.stat()
    assert run.commit(keys[2], [{"length": 3}], save) and run.compact() == {"table3": 3}
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run.done() == set(keys)
    assert sorted(run.fits()["length"].to_pylist()) == [1, 2, 3]


def test_a_report_is_the_same_whatever_the_dates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up.RunFolder.create(tmp_path / "run")
    assert cli("report", str(run.path), "-o", str(tmp_path / "r.html"), "--no-files") == 0
    before = (tmp_path / "r.html").read_bytes()
    turn(tmp_path, DAY)
    backwards(monkeypatch)
    assert cli("report", str(run.path), "-o", str(tmp_path / "r.html"), "--no-files") == 0
    assert (tmp_path / "r.html").read_bytes() == before


def test_a_sweep_whose_clock_runs_backwards_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driver and worker, each in a process whose clock goes back an hour at every look."""
    run = a_run(tmp_path / "run", units()[:2])
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(BACKWARDS)
    path = os.pathsep.join([str(tmp_path / "late"), *filter(None, sys.path)])
    command = [sys.executable, "-m", "prototok", "sweep", "run", str(run.path)]
    done = subprocess.run(
        [*command, "--workers", "1", "--device", "cpu"], capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run.done() == set(run.units()) and run.fits().num_rows == 2
    assert min(run.fits()["seconds"].to_pylist()) > 0
