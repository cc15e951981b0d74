"""Every kernel test runs once per backend that this machine has.

The Triton cases need CUDA, or the interpreter: test_triton.py runs them in a process of their own
with TRITON_INTERPRET=1, which must be set before triton is imported.
"""

from __future__ import annotations

import pytest
import torch

from prototok_kernels.backend import unavailable

DEVICES = {
    "torch": "cpu",
    "cpu": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",
}


@pytest.fixture(params=list(DEVICES))
def backend(request) -> str:
    missing = unavailable(request.param, DEVICES[request.param])
    if missing:
        pytest.skip(missing)
    return request.param


@pytest.fixture
def device(backend) -> str:
    return DEVICES[backend]


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16"])
def instruction_set(request) -> str:
    missing = unavailable("cpu", "cpu")
    if missing:
        pytest.skip(missing)
    from prototok_kernels.backend import _cpu

    if request.param not in _cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return request.param
