"""What a compiled kernel takes of a GPU, read from its binary without one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int] | None:
    """REG a thread, STACK and LOCAL bytes (where spilled registers lie); None without cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    (folder / "kernel.cubin").write_bytes(cubin)
    report = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {name: int(count) for name, count in found.items()}
