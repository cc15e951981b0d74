"""Run the rehearsals where Triton does not interpret: that is settled at its import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_rehearsals_pass_where_triton_compiles() -> None:
    pytest.importorskip("triton", reason="the triton package is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).parent],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d{3} passed", run.stdout) and "skipped" not in run.stdout, run.stdout
