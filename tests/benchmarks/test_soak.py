"""The soak tells what grows from what only jumps about, and its work runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

import prototok

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def windows(soak: ModuleType, **growth: float) -> list:
    """Sixty minutes of noise, with outliers, growing by so much over them."""
    draw = random.Random(0)
    base = {"memory": 900.0, "throughput": 50.0, "handles": 12, "threads": 3, "temporary_files": 2}
    found = []
    for minute in range(60):
        values = {k: v + growth.get(k, 0) * minute / 60 for k, v in base.items()}
        values["memory"] += draw.gauss(0, 5) + (300 if minute == 40 else 0)
        values["throughput"] *= 0.2 if minute == 55 else draw.uniform(0.9, 1.1)
        found.append(soak.Window(minutes=float(minute), cpu_minutes=float(minute), **values))
    return found


@pytest.mark.parametrize(
    ("growth", "bad"),
    [
        ({}, set()), ({"memory": 90}, {"memory"}), ({"memory": -90}, set()),
        ({"throughput": -25}, {"throughput"}), ({"handles": 3}, {"handles"}),
        ({"threads": 2}, {"threads"}), ({"temporary_files": 60}, {"temporary_files"}),
    ],
)  # fmt: skip
def test_what_grows_is_told(soak: ModuleType, growth: dict, bad: set) -> None:
    verdict = soak.judge(windows(soak, **growth))
    assert {name for name, row in verdict.items() if row["too_much"]} == bad


def test_a_few_windows_tell_nothing(soak: ModuleType) -> None:
    with pytest.raises(ValueError, match="7 windows are too few"):
        soak.judge(windows(soak)[:7])


def test_four_rounds_leave_their_results_and_no_more(
    soak: ModuleType, tiny_lm: prototok.FrozenLM, tmp_path: Path
) -> None:
    assert list(itertools.islice(soak.rounds(tiny_lm, tmp_path), 4)) == [8, 8, 8, 2]
    seen = soak.look(1.0, 2.0, tmp_path)
    assert seen.temporary_files == 3 and seen.memory > 10 and seen.handles > 2
    assert dataclasses.asdict(seen)["throughput"] == 2.0
