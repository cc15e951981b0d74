"""`prototok capacity` keeps each fit as it ends, and goes on from there; as `prototok fit` does."""

from __future__ import annotations

import errno
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import prototok
from prototok.cli import main
from prototok.fitting.capacity import CapacityInterrupted, Growth
from prototok.fitting.capacity_file import CapacityFile

BOOK = (Path(prototok.__file__).parent / "models/tiny-llama/held_out.txt").read_text()
LENGTHS = (1, 2, 3)
# `import prototok.fitting.capacity` names the module; the attribute of that name is the function.
module = importlib.import_module("prototok.fitting.capacity")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, and a grid of lengths that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prototok.fitting.capacity_file.GRID", LENGTHS)
    (tmp_path / "book.txt").write_text(BOOK[:400])
    return tmp_path


def cli(*arguments: str) -> int:
    command = ["capacity", "book.txt", "--texts", "3", "--longest", "4", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *arguments])
    return int(ended.value.code or 0)


def columns(path: Path) -> list[list[str]]:
    """The lines of a file, without updates and seconds, which differ from run to run."""
    return [line.split(",")[:4] for line in path.read_text().splitlines()]


def stop_after(fits: int, monkeypatch: pytest.MonkeyPatch, how: BaseException) -> None:
    """Have the measurement end by `how` when so many fits are kept."""
    real, kept = CapacityFile.keep, []

    def keep(self: CapacityFile, growth: Growth, lm: prototok.FrozenLM) -> None:
        if len(kept) == fits:
            raise how
        real(self, growth, lm)
        kept.append(growth)

    monkeypatch.setattr(CapacityFile, "keep", keep)


def test_an_interrupted_measurement_goes_on_and_gives_what_one_that_was_not_gives(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert cli("-o", "whole.csv") == 0
    made = []
    real = module.fit_groups
    monkeypatch.setattr(module, "fit_groups", lambda setup, groups, *rest: (
        made.extend((group.index, len(group.rows[0].targets)) for group in groups),
        real(setup, groups, *rest),
    )[1])  # fmt: skip
    with monkeypatch.context() as patched:
        stop_after(5, patched, KeyboardInterrupt())
        assert cli("-o", "c.csv") == 130
    assert "of 3 texts have ended, and --resume goes on from there" in capsys.readouterr().err
    assert len(os.listdir("c.csv.unfinished")) == 4  # three texts and the plan
    made.clear()
    assert cli("-o", "c.csv") == 2
    assert "out: c.csv is unfinished; give --resume" in capsys.readouterr().err
    assert cli("-o", "c.csv", "--resume", "--restarts", "2") == 2
    assert "resume: c.csv holds a fit of other restarts" in capsys.readouterr().err
    assert cli("-o", "c.csv", "--resume") == 0
    assert len(made) == 4  # of nine, five were kept
    assert columns(home / "c.csv") == columns(home / "whole.csv")
    assert sorted(os.listdir()) == ["book.txt", "c.csv", "whole.csv"]


def test_texts_that_have_ended_are_written_when_it_is_interrupted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(8, patched, KeyboardInterrupt())
        assert cli("-o", "c.csv") == 130
    assert [line[1] for line in columns(home / "c.csv")] == ["exact", "3", "3"]
    kept = (home / "c.csv").read_bytes()
    with monkeypatch.context() as patched:
        stop_after(7, patched, KeyboardInterrupt())
        assert cli("-o", "c.csv", "--overwrite") == 130
    assert (home / "c.csv").read_bytes() == kept  # more is not replaced by less
    assert cli("-o", "c.csv", "--resume") == 0
    assert len(columns(home / "c.csv")) == 4


def test_an_earlier_measurement_is_not_overwritten_without_a_word(home: Path, capsys) -> None:
    assert cli("-o", "c.csv") == 0
    before = (home / "c.csv").read_bytes()
    for options in ([], ["--resume"]):
        assert cli("-o", "c.csv", *options) == 2
        assert "out: c.csv holds an earlier measurement of 3 texts" in capsys.readouterr().err
    assert (home / "c.csv").read_bytes() == before
    assert cli("-o", "c.csv", "--overwrite", "--texts", "1") == 0
    assert len(columns(home / "c.csv")) == 2
    assert sorted(os.listdir()) == ["book.txt", "c.csv"]


def test_a_folder_of_the_users_is_left_alone(home: Path, capsys) -> None:
    (home / "c.csv.unfinished").mkdir()
    (home / "c.csv.unfinished" / "thesis.txt").write_text("years of work")
    assert cli("-o", "c.csv", "--overwrite") == 2
    assert "c.csv.unfinished exists and holds something else" in capsys.readouterr().err
    assert os.listdir("c.csv.unfinished") == ["thesis.txt"]


def test_a_disk_that_fills_up_loses_no_fit(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        stop_after(4, patched, OSError(errno.ENOSPC, "No space left on device"))
        assert cli("-o", "c.csv") == 3
    assert "c.csv cannot be written any more (No space left on device)" in capsys.readouterr().err
    assert cli("-o", "c.csv", "--resume") == 0
    assert len(columns(home / "c.csv")) == 4


def test_nothing_is_left_of_a_measurement_that_could_not_begin(home: Path) -> None:
    assert cli("-o", "new/c.csv", "--model", "tiny-lama") == 2
    assert cli("-o", "new/c.csv", "--dtype", "float7") == 2
    assert os.listdir() == ["book.txt"]


@pytest.mark.parametrize("damage", [b"", b"not ours", None])
def test_a_damaged_part_is_one_sentence(
    damage: bytes | None, home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patched:
        stop_after(4, patched, KeyboardInterrupt())
        assert cli("-o", "c.csv") == 130
    parts = sorted((home / "c.csv.unfinished").glob("0*"))
    parts[1].write_bytes(parts[0].read_bytes() if damage is None else damage)
    capsys.readouterr()
    assert cli("-o", "c.csv", "--resume") == 2
    said = capsys.readouterr().err
    assert "00000001 is" in said and said.count("\n") == 1


def test_in_python_an_interrupt_carries_how_far_it_came(small_lm: prototok.FrozenLM) -> None:
    ids = torch.randint(small_lm.vocab_size, (2, 2), generator=torch.Generator().manual_seed(5))
    recipe = prototok.Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=200)
    given = {"lengths": (1, 2), "recipe": recipe, "progress": False}
    whole = prototok.capacity(small_lm, ids, **given)
    seen: list[Growth] = []

    def stop(growth: Growth) -> None:
        seen.append(growth)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(CapacityInterrupted) as stopped:
        prototok.capacity(small_lm, ids, **given, on_fit=stop)
    assert stopped.value.texts == [seen[2].text] and stopped.value.result.exact.tolist() == [2]
    other = pickle.loads(pickle.dumps(stopped.value))  # as from another process
    assert other.texts == stopped.value.texts and len(other.grown) == len(stopped.value.grown)
    seen.clear()
    found = prototok.capacity(small_lm, ids, **given, grown=stopped.value.grown, on_fit=seen.append)
    assert len(seen) == 1
    assert torch.equal(found.exact, whole.exact) and torch.equal(found.ended, whole.ended)
    for wrong in (3, [3], [Growth(2)], [Growth(0, stage=3)], [Growth(0, start=torch.zeros(3))]):
        with pytest.raises(ValueError, match="^grown: "):
            prototok.capacity(small_lm, ids, **given, grown=wrong)


def test_a_process_that_is_stopped_keeps_its_fits(tmp_path: Path) -> None:
    """SIGKILL is in tests/benchmarks/test_kills.py."""
    (tmp_path / "book.txt").write_text(BOOK[:3000])
    command = [sys.executable, "-m", "prototok", "capacity", "book.txt", "-o", "c.csv"]
    process = subprocess.Popen(
        [*command, "--texts", "100", "--longest", "5"], cwd=tmp_path, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("c.csv.unfinished/0*"))) < 2:
            assert time.monotonic() < end and process.poll() is None, "no fit was kept"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    kept = list(tmp_path.glob("c.csv.unfinished/0*"))
    assert len(kept) >= 2
    other = subprocess.run(
        [*command, "--texts", "99", "--longest", "5", "--resume"], cwd=tmp_path, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert other.returncode == 2 and "c.csv holds a fit of other texts" in other.stderr
    assert list(tmp_path.glob("c.csv.unfinished/0*")) == kept
