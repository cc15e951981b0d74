"""What machine and which versions this is, and how fast it computes and copies."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from pathlib import Path

import torch

from prototok.common.clock import timed
from prototok.common.version import VERSION
from prototok_kernels.backend import Machine, this_machine
from prototok_kernels.plan import Plan, Shape, plan_of

_PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "flash-attn")


def describe() -> dict[str, str]:
    """Describe machine and versions, for records; no value names a user or a host."""
    found = this_machine()
    facts = {
        "prototok": VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "C++ kernels": _kernels(found),
        "AMX": found.lacks_instructions("amx") or "used" if found.cpp else "not built",
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    return facts | {name: _version(name) for name in _PACKAGES}


def _kernels(found: Machine) -> str:
    """Name the instructions of this processor that the C++ has, the ones that it uses first."""
    if not found.cpp:
        return "not built, and slower so; reinstall with a C++17 compiler"
    return ", ".join(found.instruction_sets)


def usual_plan(dtype: torch.dtype) -> Plan:
    """Return what "auto" takes on this machine for a usual model, without one at hand.

    The model is a Llama of hidden size 768, 12 heads and even sizes; 16 rows of 64 positions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = None if dtype == torch.bfloat16 else f"a weight is {str(dtype).removeprefix('torch.')}"
    shape = Shape(
        blocks=12, hidden_size=768, heads=12, head_size=64, parallel=(False, False), unpacked=why,
        head_unpacked=why,
    )  # fmt: skip
    return plan_of(
        shape, rows=16, length=64, dtype=dtype, device=device, backend="auto", pair=True
    )  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Name the processor with its family and model, since names like "AMD EPYC" say too little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or "unknown"
    if "cpu family" not in facts or "model" not in facts:
        return name
    return f"{name} (family {facts['cpu family']}, model {facts['model']})"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP/s of a large square product: this machine's practical peak in this dtype."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device))


def copy_rate(device: torch.device) -> float:
    """Measure bytes/s, read and written, of a copy far larger than the caches."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / statistics.median(timed(lambda: b.copy_(a), device))
