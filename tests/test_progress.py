"""Long work says where it is: on a terminal, in a notebook, in a log."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prototok
from prototok import FrozenLM, Recipe
from prototok.common import progress
from prototok.common.progress import Progress, duration
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.engine.setup import Setup
from prototok.fitting.under_way import UnderWay
from prototok.results.arrangement import Arrangement

TEXTS = [[3, 7, 1], [9, 2, 4]]


def under_way_of(lm: FrozenLM, texts: int, max_steps: int) -> UnderWay:
    ids = [torch.tensor([1, 2, 3, 4])] * texts
    inputs = OneForward(Arrangement.parse("e m*"))
    setup = Setup(lm, inputs, Recipe(max_steps=max_steps), "auto", None)
    return UnderWay(make_groups(ids, [0], None, None), setup)


def event(rows: list[int], steps: list[int], correct: list[int]) -> FitEvent:
    columns = (torch.tensor(values) for values in (rows, steps, correct))
    places, made, right = columns
    return FitEvent(places, made, right.float(), right, right.float())


def test_before_any_row_ended_the_most_is_said(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = under_way_of(small_lm, 3, 100)
    under_way.see(event([0, 1], [20, 20], [2, 4]))
    monkeypatch.setattr(time, "monotonic", lambda: under_way.started + 8.0)
    # 40 updates took 8 s; 80 + 80 + 100 are left at most, at 0.2 s each.
    assert under_way.note().startswith("step 20 of 100, accuracy 0.75, at most 52 s left, ")
    assert under_way.note().endswith(" GB")


def test_rows_that_ended_tell_how_long_others_take(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = under_way_of(small_lm, 4, 100)
    under_way.end([SimpleNamespace(steps=10), SimpleNamespace(steps=30)])
    under_way.see(event([2], [20], [4]))
    monkeypatch.setattr(time, "monotonic", lambda: under_way.started + 60.0)
    # A second an update. The row at 20 may end at 30, as the one that was longer; a new one at 20.
    said = under_way.note()
    assert "accuracy 1.00, 2 texts/min, about 30 s left, at most 3 min" in said
    under_way.see(
        event([2], [50], [4])
    )  # longer than all that ended: nothing but the most is known
    assert "about 47 s left, at most 2 min" in under_way.note()


def test_times_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (3.2, 89, 600, 7200)] == ["3 s", "89 s", "10 min", "2.0 h"]


def test_lines_come_now_and_then_and_only_when_asked_for(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    made = []

    def note() -> str:
        made.append(now[0])
        return "so far"

    for shown, expected in ((True, 2), (None, 0), (False, 0)):
        now[0] = 0.0
        with Progress(9, "fit", shown) as bar:
            for second in range(70):
                now[0] = float(second)
                bar.update(second // 10, note)
            bar.say("the end")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == expected + bool(expected)
    assert made == [30.0, 60.0]  # a note that is not shown is not made


def test_steady_work_says_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for first in (0, 40):  # a run that goes on is judged by what it does itself
        now[0] = 0.0
        with Progress(100, "train", True, steady=True) as bar:
            bar.update(first, "")
            now[0] = 40.0
            bar.update(first + 20, "solved")
        lines = capsys.readouterr().err.splitlines()
        left = {0: "3 min", 40: "80 s"}[first]
        assert lines == [f"train: {first + 20}/100 after 40 s, solved, about {left} left"]


def test_capacity_says_where_its_fits_are(
    small_lm: FrozenLM, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress._Lines, "every", 0.0)
    prototok.capacity(small_lm, [[3] * 12, [5] * 12], recipe=Recipe(max_steps=30), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert "2 still growing" in lines[0] and "step 0 of 30, accuracy" in lines[0]
    assert any(" left" in line and " GB" in line for line in lines[1:])


def test_a_total_that_is_not_known_is_left_out(
    small_lm: FrozenLM, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On every view; and a list has a total, an iterator has none."""
    monkeypatch.setattr(progress._Lines, "every", 0.0)
    options = {"recipe": Recipe(max_steps=3), "shard": 2, "progress": True}
    prototok.fit_stream(small_lm, iter([*TEXTS, [5]]), tmp_path / "F", **options)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("fit: 0 after 0 s, 2 rows under way, step 0, ")
    assert last.startswith("fit: 3 after ") and " of 3 exact, " in last and " texts/h, " in last
    prototok.fit_stream(small_lm, TEXTS, tmp_path / "G", **options)
    assert "fit: 2/2 after " in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress._Terminal, "every", 0.0)
    prototok.fit_stream(small_lm, iter(TEXTS), tmp_path / "H", **(options | {"progress": None}))
    assert "2/?" in capsys.readouterr().err
    pytest.importorskip("IPython")
    assert progress._Notebook(None, "fit")._drawn(3, "").startswith("<progress></progress> fit 3, ")


def test_a_terminal_has_a_bar_over_a_line(
    small_lm: FrozenLM, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress._Terminal, "every", 0.0)
    prototok.fast_fit(small_lm, TEXTS, recipe=Recipe(max_steps=50))
    said = capsys.readouterr().err
    assert "of 50, accuracy" in said and " GB" in said and "2/2" in said


def test_what_did_not_converge_names_what_to_try(
    small_lm: FrozenLM, capsys: pytest.CaptureFixture
) -> None:
    prototok.fast_fit(small_lm, TEXTS, recipe=Recipe(max_steps=1), progress=True)
    said = capsys.readouterr().err
    assert "2 texts of 2 did not come back whole" in said
    for way in ("a smaller length", "4 seeds", "a prefix", "a learned start", "more than 1 steps"):
        assert way in said
    prototok.fast_fit(small_lm, TEXTS, recipe=Recipe(max_steps=1), progress=True, seeds=3)
    assert "4 seeds" not in capsys.readouterr().err
    prototok.fast_fit(small_lm, TEXTS, recipe=Recipe(max_steps=1))
    prototok.fast_fit(small_lm, [[3]], recipe="fast", progress=True)
    assert capsys.readouterr().err == ""


NOTEBOOK = """
import prototok
lm = prototok.load("tiny-llama")
fit = prototok.fast_fit(lm, ["Call me Ishmael."])
fit
"""


def test_a_notebook_shows_a_bar_and_a_table() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(book, timeout=300).execute()
    pages = [o["data"]["text/html"] for o in book.cells[0].outputs if "data" in o]
    assert any("<progress" in page and "fit 1/1, " in page for page in pages)
    assert "FitResult(1 text × 1 seed, 1/1 exact" in pages[-1] and "<table>" in pages[-1]
