"""What this process can run: Triton, the C++ kernels, and the instruction sets of the processor.

Found at import. `plan` chooses from it; nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

try:
    import triton
except ImportError:  # no Triton for this platform, or a torch without CUDA
    triton = None
try:
    from prototok_kernels import _cpu  # type: ignore[attr-defined]
except ImportError:  # installed without a compiler
    _cpu = None

# What the kernels take; torch takes every floating dtype.
KERNEL_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}

# Instruction sets whose products take packed weights, the fastest first.
PACKED = ("amx", "avx512bf16", "avx2")
# The first of them with emulated tiles, for tests; taken only where `instruction_set` asks for it.
EMULATED = "amx-emulated"

# Fixed when triton decorates the kernels, at import, like `triton.jit` itself.
TRITON_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Machine:
    """What there is to choose from.

    cpp              the C++ kernels were built
    instruction_sets those of the C++ kernels that this processor has, the best first
    triton           the triton package is installed
    interpreted      Triton's kernels run through its interpreter, on CPU tensors
    threads          threads of torch's CPU operations and of the C++ kernels
    missing          instruction sets of the C++ kernels that cannot run here, each with the reason
    """

    cpp: bool
    instruction_sets: tuple[str, ...]
    triton: bool
    interpreted: bool
    threads: int
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def packed(self) -> str | None:
        """The instruction set of products with packed weights, or None."""
        return next((name for name in self.instruction_sets if name in (*PACKED, EMULATED)), None)

    def lacks_instructions(self, name: str) -> str | None:
        """Return why the C++ kernels do not take this instruction set, or None when they can."""
        if name in self.instruction_sets:
            return None
        return dict(self.missing).get(name, "not among those in use")

    def lacks(self, backend: str, kind: str) -> str | None:
        """Return why `backend` cannot run on devices of type `kind`, or None when it can."""
        if backend == "triton":
            if not self.triton:
                return "backend: 'triton' needs the triton package, which is not installed"
            if kind != "cuda" and not (kind == "cpu" and self.interpreted):
                return f"backend: 'triton' needs tensors on a CUDA device, these are on {kind!r}"
        if backend == "cpu":
            if kind != "cpu":
                return f"backend: 'cpu' needs tensors on the CPU, these are on {kind!r}"
            if not self.cpp:
                return "backend: 'cpu' needs the C++ kernels; this installation has none"
        return None


def _instruction_sets() -> tuple[str, ...]:
    return () if _cpu is None else tuple(_cpu.instruction_sets())


_found = _instruction_sets()
_MISSING = () if _cpu is None else tuple(map(tuple, _cpu.missing_instruction_sets()))


def this_machine() -> Machine:
    """Return what this process can run, with as many threads as torch uses now."""
    return _machine(_cpu is not None, _found, triton is not None, torch.get_num_threads())


@lru_cache(maxsize=64)  # what plans are kept by is then the same object, which compares at once
def _machine(cpp: bool, instruction_sets: tuple[str, ...], triton: bool, threads: int) -> Machine:
    return Machine(cpp, instruction_sets, triton, TRITON_INTERPRETED, threads, _MISSING)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Let all C++ kernels of this process run on one instruction set instead of the best.

    For tests, and for measuring what another processor would do. What was made of weights before
    stays as it is, so load models within.

    Args:
        name: one that this processor has, or "amx-emulated".

    Raises:
        ValueError: this processor does not have it.
    """
    global _found
    if _cpu is None:
        raise ValueError(f"instruction_set: {name!r} needs the C++ kernels, which are not built")
    _cpu.prefer_instruction_set(name=name)
    _found = _instruction_sets()
    try:
        yield
    finally:
        _cpu.prefer_instruction_set(name="")
        _found = _instruction_sets()


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has; 1 for any other."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """Return what a CUDA device is compiled for, 90 for sm_90; 0 for any other."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def early(x: torch.Tensor) -> dict[str, bool]:
    """Return the options of a Triton launch that may begin while the one before it still runs.

    Such a kernel takes EARLY. It may read what nothing writes, weights, and then waits for the
    launch before it. GPUs from sm_90 on can; for others there are no options but EARLY.
    """
    if capability(x.device) < 90:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def unavailable(backend: str, kind: str) -> str | None:
    """Return why `backend` cannot run here on devices of type `kind`, or None when it can."""
    return this_machine().lacks(backend, kind)


def require(backend: str, x: torch.Tensor) -> None:
    """Raise ValueError unless `backend` ("torch", "triton" or "cpu") can compute on x."""
    if backend not in ("torch", *KERNEL_DTYPES):
        raise ValueError(f"backend: {backend!r} is not one of torch, triton, cpu")
    missing = unavailable(backend, x.device.type)
    if missing is not None:
        raise ValueError(missing)
    if x.dtype not in KERNEL_DTYPES.get(backend, (x.dtype,)):
        raise ValueError(f"backend: {backend!r} does not take tensors of {x.dtype}")
