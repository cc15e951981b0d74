"""The committed figures and the shipped report are what their records say."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from prototok.report.build import build
from prototok.report.results import read

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("draw")


def test_figures_are_those_of_the_records(draw: ModuleType) -> None:
    found = dict(draw.figures())
    assert len(found) >= 3
    for path, drawn in found.items():
        assert path.read_text(encoding="utf-8") == drawn, path.name


def test_the_recipes_that_did_not_get_there_are_drawn(draw: ModuleType) -> None:
    record = json.loads((draw.RESULTS / "recipes.json").read_text())
    cells = [s for s in record["summary"] if s["part"] == "test" and s["texts"] >= 16]
    without = [s for s in cells if s["steps_quartiles"][1] is None]
    drawn = (draw.RESULTS / "recipes.svg").read_text(encoding="utf-8")
    assert without and len(re.findall(r"/16 exact[^<]*</text>", drawn)) == len(cells)
    assert drawn.count("no median, ") == len(without)


def test_a_shipped_report_is_what_is_built_from_its_run(draw: ModuleType, tmp_path: Path) -> None:
    """All but its digits: the last of them are those of the machine and of its libraries."""
    for run, title in draw.REPORTS.items():
        built = build(read(run), tmp_path / "r.html", files=False, title=title).page
        same(built, run.with_suffix(".html"))


def same(built: Path, shipped: Path) -> None:
    """Require two pages to differ in no more than the digits of what they say and draw."""

    def skeleton(path: Path) -> str:
        text = re.sub(r"<svg.*?</svg>", "<svg/>", path.read_text(encoding="utf-8"), flags=re.S)
        return re.sub(r"[-−+]?[\d.,]+(e[-+]\d+)?", "0", text)

    assert skeleton(built) == skeleton(shipped)
    drawn, there = (page.read_text(encoding="utf-8").count("<svg") for page in (built, shipped))
    assert drawn == there
