"""SIGKILL at random moments loses nothing; benchmarks/kills.py does the same a hundred times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


def test_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--fit", "2", "--capacity", "2", "--sweep", "2"]
    command += ["--dataset", "2", "--texts", "8", "--workers", "1", "--out", "k.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["kills"] == 8 and found["sweep"]["units_seen_done_before_a_kill"] > 0
    kinds = ("fit", "capacity", "dataset", "sweep")
    assert [found[what]["problems"] for what in kinds] == [[], [], [], []]
