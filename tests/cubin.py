"""What a compiled kernel takes of a GPU, read from its binary and its PTX without one."""

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


def narrow_loads_in_loops(ptx: str) -> list[str]:
    """Loads of one or two bytes from global memory between a label and a branch back to it."""
    lines = ptx.splitlines()
    labels: dict[str, int] = {}
    found: dict[int, str] = {}
    for end, line in enumerate(lines):
        label = re.match(r"\s*(\$L\w+):", line)
        if label:
            labels[label[1]] = end
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if branch and branch[1] in labels:
            for at in range(labels[branch[1]], end):
                if re.search(r"\bld\.global\S*\.[bus](?:8|16)\s", lines[at]):
                    found[at] = lines[at].strip()
    return list(found.values())
