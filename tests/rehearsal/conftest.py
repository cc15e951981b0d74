"""A rehearsal watches Triton launch, which it does not where its kernels are interpreted.

So in the process of the other tests, which interpret, all of this runs in a process of its own
(test_process.py); with TRITON_INTERPRET=0, or on a GPU, it runs directly.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prototok_kernels.backend import TRITON_INTERPRETED, triton

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

alone = Path(__file__).parent / "test_process.py"
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.glob("test_*.py")
    if (path == alone) != (TRITON_INTERPRETED or triton is None)
]
