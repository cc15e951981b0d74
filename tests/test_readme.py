"""The README's tables are the committed results, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_the_committed_results() -> None:
    script = ROOT / "benchmarks" / "readme_tables.py"
    subprocess.run([sys.executable, script, "--check"], check=True)


def test_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "proto_tokens.safetensors").is_file()
    assert "Call me Ishmael." in run.stdout
