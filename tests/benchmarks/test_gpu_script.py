"""benchmarks/gpu.sh runs everything, stops at nothing, and says what failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
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


def run(  # type: ignore[no-untyped-def]
    tmp_path: Path, *arguments: str, fails: str = "nothing", hangs: str = "never"
):
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(PYTHON.format(log=log, fails=fails, hangs=hangs))
    python.chmod(0o755)
    out = tmp_path / "out"
    finished = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", "--out", str(out), *arguments],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHON": str(python)}, timeout=50,
    )  # fmt: skip
    return finished, out, log.read_text().splitlines()


def kept(archive: Path) -> dict[str, str]:
    """The files in an archive, by name."""
    with tarfile.open(archive) as tar:
        files = [member for member in tar.getmembers() if member.isfile()]
        return {Path(m.name).name: tar.extractfile(m).read().decode() for m in files}  # type: ignore[union-attr]


def listed() -> dict[str, tuple[int, dict[str, int]]]:
    """Of each set the sum that is printed, and its steps' limits."""
    lines = subprocess.run(
        ["bash", str(SCRIPT), "--list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = {}
    for line in lines:
        name, total, steps = re.fullmatch(r"(\w+) \((\d+) of 570 s\): (.*)", line).groups()  # type: ignore[union-attr]
        pairs = (step.split("=") for step in steps.split())
        found[name] = int(total), {step: int(seconds) for step, seconds in pairs}
    return found


def test_the_limits_of_a_set_add_up_to_its_budget() -> None:
    sets = listed()
    assert set(sets) == {"first", "second", "third", "fourth"}
    for total, steps in sets.values():
        assert total == sum(steps.values()) <= 570
    # Every step that there is has its place in a set, and the products come first.
    known = set(re.findall(r"\[([\w.-]+)\]=\d+", SCRIPT.read_text()))
    assert {step for _, steps in sets.values() for step in steps} == known
    assert next(step for step in sets["first"][1] if step not in ("env", "driver")) == "gemms"


def test_every_step_runs_and_one_archive_keeps_it(tmp_path: Path) -> None:
    finished, out, calls = run(tmp_path, "first", "second", "third", "fourth")
    assert finished.returncode == 0, finished.stderr
    summary = (out / "summary.txt").read_text().splitlines()
    assert len(summary) >= 16 and all(": ok, " in line for line in summary)
    assert {path.name for path in out.iterdir()} == {"summary.txt", "steps.tar.gz"}
    files = kept(out / "steps.tar.gz")
    assert {f"{line.split(':')[0]}.txt" for line in summary} <= set(files)
    scripts = {word for call in calls for word in call.split() if word.startswith("benchmarks/")}
    missing = {script for script in scripts if not (ROOT / script).exists()}
    assert not missing
    # In order of importance, and none twice.
    names = [line.split(":")[0] for line in summary]
    assert len(set(names)) == len(names)
    telling = ("gemms", "graphs", "fit-step-llama-3.2-1b", "throughput", "tests", "ncu", "kernels")
    assert sorted(telling, key=names.index) == list(telling)
    assert any("pytest" in call and call.endswith("tests/cuda") for call in calls)


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    finished, out, calls = run(tmp_path, "ncu", "slots")
    assert finished.returncode == 0, finished.stderr
    lines = (out / "summary.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["ncu", "slots"]
    assert not any("pytest" in call for call in calls)
    refused = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", "everything"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr == "gpu.sh: everything is no step and no set of steps; see --list\n"


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    finished, out, _ = run(tmp_path, fails="tests/cuda")
    assert finished.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert "graphs: failed with exit code 3, see graphs.txt" in summary
    assert kept(out / "steps.tar.gz")["graphs.txt"] == "what went wrong\n"
    assert summary.count(": ok, ") >= 6
    assert finished.stdout.strip().endswith(summary.strip().splitlines()[-1])


def test_time_is_bounded(tmp_path: Path) -> None:
    finished, out, _ = run(tmp_path, "first", "--budget", "8", hangs="tests/cuda")
    assert finished.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert re.search(r"graphs: stopped after [5-8] s", summary)
    assert "throughput: not run, no time left" in summary


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    finished = subprocess.run(
        ["bash", str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True, check=False,
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
