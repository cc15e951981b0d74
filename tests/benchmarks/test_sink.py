"""`benchmarks/sink.py`: any arrangement, confirmed by plain transformers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.support import BENCHMARKS


def test_what_is_confirmed_stands_as_it_was_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    sink = importlib.import_module("sink")
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen.")

    def run(*options: object) -> dict:
        given = ["--model", "tiny-neox", "--text", text, "--texts", 2, "--length", 6]
        given += ["--recipes", "fast", "--prefix", " the", "--max-steps", 300, "--out", out]
        monkeypatch.setattr(sys, "argv", ["sink.py", *map(str, [*given, *options])])
        sink.main()
        return json.loads(out.read_text())

    for arrangement in ("(e m)*", "e m*+1"):
        out.unlink(missing_ok=True)
        record = run("--arrangement", arrangement)
        (cell,) = record["cells"]
        assert record["arrangement"] == arrangement and cell["exact"] == 2
        assert cell["confirmed"]["float32"] == 2
    with pytest.raises(SystemExit, match="other texts or steps"):
        run("--arrangement", "(e m)*")
