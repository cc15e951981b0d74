"""benchmarks/gpu.sh runs everything, stops at nothing, and says what failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

# Stands for python: notes its arguments, and fails or hangs where they hold a word.
PYTHON = """#!/bin/bash
echo "$@" >> "{log}"
case "$*" in
    *"{fails}"*) echo "what went wrong"; exit 3 ;;
    *"{hangs}"*) sleep 60 ;;
    *--names*) echo _a_kernel ;;
esac
exit 0
"""


def run(tmp_path: Path, fails: str = "nothing", hangs: str = "never", **environment: str):  # type: ignore[no-untyped-def]
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(PYTHON.format(log=log, fails=fails, hangs=hangs))
    python.chmod(0o755)
    out = tmp_path / "out"
    finished = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", str(out)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHON": str(python)} | environment, timeout=50,
    )  # fmt: skip
    return finished, out, log.read_text().splitlines()


def test_every_step_runs_and_has_a_file(tmp_path: Path) -> None:
    finished, out, calls = run(tmp_path)
    assert finished.returncode == 0, finished.stderr
    summary = (out / "summary.txt").read_text().splitlines()
    assert len(summary) >= 12 and all(": ok, " in line for line in summary)
    for line in summary:
        assert (out / f"{line.split(':')[0]}.txt").exists()
    scripts = {word for call in calls for word in call.split() if word.startswith("benchmarks/")}
    missing = {script for script in scripts if not (ROOT / script).exists()}
    assert not missing
    # In order of importance: correctness before speed.
    names = [line.split(":")[0] for line in summary]
    assert names.index("graphs") < names.index("tests") < names.index("kernels")


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    finished, out, _ = run(tmp_path, fails="test_static_buffers")
    assert finished.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert "graphs: failed with exit code 3, see graphs.txt" in summary
    assert (out / "graphs.txt").read_text() == "what went wrong\n"
    assert summary.count(": ok, ") >= 11
    assert finished.stdout.strip().endswith(summary.strip().splitlines()[-1])


def test_time_is_bounded(tmp_path: Path) -> None:
    finished, out, _ = run(tmp_path, hangs="test_static_buffers", BUDGET="8")
    assert finished.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert re.search(r"graphs: stopped after [5-8] s", summary)
    assert "tests: not run, no time left" in summary


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    finished = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHON": "/bin/false"}, timeout=20,
    )  # fmt: skip
    assert finished.returncode == 2
    assert finished.stderr.startswith("gpu.sh: torch sees no CUDA device")


def test_the_launcher_knows_every_kernel_and_launches_it() -> None:
    pytest.importorskip("triton")
    sources = [p.read_text() for p in (ROOT / "kernels" / "prototok_kernels").rglob("*.py")]
    defined = {
        name
        for source in sources
        for name in re.findall(r"@triton\.jit\s+def (\w*kernel)\(", source)
    }
    launcher = str(ROOT / "benchmarks" / "launch_kernels.py")
    named = subprocess.run(
        [sys.executable, launcher, "--names"], capture_output=True, text=True, check=True
    )
    assert set(named.stdout.split()) == defined
    interpreted = subprocess.run(
        [sys.executable, launcher, "--device", "cpu"], capture_output=True, text=True, check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert '"launched"' in interpreted.stdout.splitlines()[-1]
