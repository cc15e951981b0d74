"""Every kernel test runs once per backend that this machine has.

The Triton cases need CUDA, or the interpreter: test_triton.py runs them in a process of their own
with TRITON_INTERPRET=1, which must be set before triton is imported.
"""

from __future__ import annotations

import pytest
import torch

from prototok_kernels.backend import unavailable

CUDA = torch.cuda.is_available()
# Plain torch runs on every device there is, each of the others on its own.
CASES = {
    "torch": ("torch", "cpu"),
    "cpu": ("cpu", "cpu"),
    "triton": ("triton", "cuda" if CUDA else "cpu"),
} | ({"torch on cuda": ("torch", "cuda")} if CUDA else {})


@pytest.fixture(params=list(CASES))
def backend_and_device(request) -> tuple[str, str]:
    missing = unavailable(*CASES[request.param])
    if missing:
        pytest.skip(missing)
    return CASES[request.param]


@pytest.fixture
def backend(backend_and_device) -> str:
    return backend_and_device[0]


@pytest.fixture
def device(backend_and_device) -> str:
    return backend_and_device[1]


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16"])
def instruction_set(request) -> str:
    missing = unavailable("cpu", "cpu")
    if missing:
        pytest.skip(missing)
    from prototok_kernels.backend import _cpu

    if request.param not in _cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(params=["triton"])
def triton_device(request) -> str:
    """Where a kernel runs that is Triton's alone."""
    missing = unavailable(*CASES[request.param])
    if missing:
        pytest.skip(missing)
    return CASES[request.param][1]
