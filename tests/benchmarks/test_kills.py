"""SIGKILL at random moments loses nothing; benchmarks/kills.py does the same a hundred times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


@pytest.mark.parametrize("what", ["fit", "capacity", "sweep"])
def test_kills_lose_nothing(what: str, tmp_path: Path) -> None:
    kills = {"fit": 0, "capacity": 0, "sweep": 0} | {what: 2}
    command = [sys.executable, str(SCRIPT), "--texts", "10", "--workers", "1", "--out", "k.json"]
    command += [word for name, count in kills.items() for word in (f"--{name}", str(count))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["kills"] == 2 and list(found[what]["problems"]) == []
    assert what != "sweep" or found["sweep"]["units_seen_done_before_a_kill"] > 0
