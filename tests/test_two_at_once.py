"""Two processes at one place: one is refused, or both work and nothing is doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import prototok
from prototok import FitResult
from prototok.cli import main
from prototok.common.files import try_folder
from prototok.sweep import schema
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit

BOOK = (Path(prototok.__file__).parent / "models/tiny-llama/held_out.txt").read_text()[:4000]

# Takes the place as the commands do, says so, and holds it until it is killed.
HOLDER = """
import sys, time
from prototok.{module} import {kind}
from pathlib import Path
with {kind}(Path({place!r}), resume=True).claimed():
    print("taken", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(BOOK)
    return tmp_path


def holding(module: str, kind: str, place: str) -> Iterator[subprocess.Popen]:
    code = HOLDER.format(module=module, kind=kind, place=place)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        yield process
    finally:
        process.kill()
        process.wait()


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("module", "kind", "place", "folder", "command"),
    [
        ("results.fit_folder", "FitFolder", "F", "F",
         ["fit", "book.txt", "-o", "F", "--length", "1", "--limit", "2"]),
        ("results.shards", "ShardFolder", "F", "F",
         ["dataset", "book.txt", "-o", "F", "--length", "1", "--limit", "2"]),
        ("fitting.capacity_file", "CapacityFile", "c.csv", "c.csv.unfinished",
         ["capacity", "book.txt", "-o", "c.csv", "--texts", "1", "--longest", "4"]),
    ],
)  # fmt: skip
def test_the_second_is_refused_until_the_first_is_gone(
    module: str, kind: str, place: str, folder: str, command: list[str], home: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    for first in holding(module, kind, place):
        for option in ([], ["--resume"], ["--overwrite"]):
            assert cli(*command, *option) == 2
            said = capsys.readouterr().err
            assert said == f"prototok: out: another process is writing to {folder}\n"
        assert sorted(os.listdir()) == sorted(["book.txt", folder]) and os.listdir(folder) == []
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert cli(*command, "--resume") == 0  # the claim went with the process
    assert sorted(os.listdir()) == sorted(["book.txt", place])


def test_a_fit_that_was_begun_keeps_its_place(home: Path) -> None:
    """Two real drivers: the second is refused, and the first ends as if it had been alone."""
    command = [sys.executable, "-m", "prototok", "fit", "book.txt", "-o", "F", "--length", "1"]
    command += ["--limit", "200", "--batch-size", "4"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 300
        while not list(home.glob("F/unfinished/*/fits.parquet")):
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.05)
        assert cli(*command[3:], "--resume") == 2
        assert cli(*command[3:], "--overwrite") == 2
        said = first.communicate(timeout=600)[1]
    finally:
        first.kill()
    assert first.returncode == 0, said
    assert FitResult.load("F").tokens.texts == 200
    assert sorted(os.listdir("F")) == ["fits.parquet", "proto_tokens.safetensors"]


def test_a_folder_that_another_made_is_not_removed(tmp_path: Path) -> None:
    with try_folder(tmp_path / "a" / "b", "out", alone=True):
        refused = pytest.raises(ValueError, match="^out: another process is writing to ")
        with refused, try_folder(tmp_path / "a" / "b", "out", alone=True):
            pass
        assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(KeyError), try_folder(tmp_path / "c" / "d", "out", alone=True):
        raise KeyError
    assert os.listdir(tmp_path) == ["a"]


def test_two_drivers_of_a_sweep_work_together(home: Path) -> None:
    (home / "c.yaml").write_text("sources: random\nlengths: [1]\ntexts: 12\nshare: none\n")
    plan = ("sweep", "plan", "table3", "--preset", "small", "--config", "c.yaml", "-o", "run")
    assert cli(*plan, "--model", "tiny-llama") == 0
    command = [sys.executable, "-m", "prototok", "sweep", "run", "run", "--workers", "1"]
    both = [
        subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        said = [driver.communicate(timeout=600)[1] for driver in both]
    finally:
        for driver in both:
            driver.kill()
    assert [driver.returncode for driver in both] == [0, 0], said
    run = RunFolder.open("run")
    assert run.done() == set(run.units()) and run.failures().num_rows == 0
    rows = run.fits().to_pylist()
    assert len(rows) == len({(row["key"], row["row"]) for row in rows}) == 12
    assert os.listdir("run/tmp") == ["lock"]
    assert cli("sweep", "verify", "run", "--device", "cpu", "--sample", "4") == 0


def test_experiments_that_are_planned_at_once_are_both_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second to make the folder used to write an empty list over the first one's."""
    unit = Unit("one-forward", "tiny-llama", "held-out", ("t0",), (0,), 4)
    row = {"text_id": "t0", "source": "held-out", "number": 0, "ids": [1, 2, 3, 4], "text": "t"}
    texts = pa.Table.from_pylist([row], schema=schema.TEXTS)
    real = RunFolder._write_json
    first = threading.Event()

    def write_json(self: RunFolder, value: dict) -> None:
        """Let the other be past its look for run.json before this one is written."""
        if not value["experiments"] and not first.is_set():
            first.set()
            other.start()
            time.sleep(0.5)
        real(self, value)

    def make(name: str) -> None:
        RunFolder.create("run").add(name, {}, [unit], texts)

    other = threading.Thread(target=make, args=("figure2",))
    monkeypatch.setattr(RunFolder, "_write_json", write_json)
    make("table3")
    other.join()
    assert sorted(RunFolder.open("run").settings()) == ["figure2", "table3"]
