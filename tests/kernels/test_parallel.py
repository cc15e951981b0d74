"""Teams of threads, on the OpenMP runtime that is in the process and on threads of their own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources")
@pytest.mark.parametrize("flags", [["-pthread"], ["-fopenmp"]])
def test_a_team_shares_out_units_and_meets(flags: list[str], tmp_path: Path) -> None:
    program = tmp_path / "parallel"
    sources = [str(HERE / "parallel.cpp"), str(CSRC / "simd" / "parallel.cpp")]
    options = ["-std=c++17", "-O2", f"-I{CSRC}", *flags]
    subprocess.run(["g++", *options, *sources, "-ldl", "-o", str(program)], check=True)
    assert subprocess.run([str(program)], timeout=300).returncode == 0
