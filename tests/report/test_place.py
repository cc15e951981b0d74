"""Where a report goes: beside a run, never into it, and over no file of the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prototok.cli import main
from prototok.report.build import build
from prototok.report.results import Results, read
from report import made_up


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.chdir(tmp_path)
    return read(made_up.RunFolder.create("run").path)


def test_a_report_does_not_go_into_a_sweep(results: Results, capsys) -> None:
    before = sorted(os.listdir("run"))
    with pytest.raises(SystemExit) as ended:
        main(["report", "run", "-o", "run.html"])
    assert ended.value.code == 2
    assert "the files of run.html would go to run, which is a sweep" in capsys.readouterr().err
    with pytest.raises(ValueError, match="which is a sweep"):
        build(results, Path("run.html"))
    assert sorted(os.listdir("run")) == before and os.listdir() == ["run"]
    build(results, Path("run.html"), files=False)  # the page alone has no folder


def test_a_report_replaces_its_own_files_and_no_others(results: Results) -> None:
    written = build(results, Path("r.html"), browser="none")
    build(results, Path("r.html"), browser="none")
    table = written.files[0]
    Path("r/thesis.txt").write_text("years of work")
    build(results, Path("r.html"), browser="none")
    assert Path("r/thesis.txt").read_text() == "years of work"
    Path("mine.html").write_text("<html>my own page</html>")
    with pytest.raises(ValueError, match=r"mine\.html is there and no file that prototok may"):
        build(results, Path("mine.html"))
    Path("s").mkdir()
    Path("s", table.name).write_text("my own table")
    with pytest.raises(ValueError, match=rf"s/{table.name} was not written by prototok"):
        build(results, Path("s.html"))
    assert Path("s", table.name).read_text() == "my own table" and not Path("s.html").exists()
    assert Path("mine.html").read_text() == "<html>my own page</html>"
