"""Which implementation of an operation runs: plain torch, Triton, or the C++ of `csrc/`."""

from __future__ import annotations

import torch

try:
    import triton
except ImportError:  # no Triton for this platform, or a torch without CUDA
    triton = None
try:
    from prototok_kernels import _cpu  # type: ignore[attr-defined]
except ImportError:  # installed without a compiler
    _cpu = None

BACKENDS = ("auto", "torch", "triton", "cpu")

# What the kernels take; torch takes every floating dtype.
KERNEL_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}

# Fixed when triton decorates the kernels, at import, like `triton.jit` itself.
TRITON_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The implementation that `backend` stands for on `device`: "torch", "triton" or "cpu".

    "auto" is Triton on CUDA and the C++ kernels on the CPU, or torch where those are missing.
    Raises ValueError when another name is given, or one that cannot run on `device`.
    """
    kind = torch.device(device).type
    missing = unavailable(backend, kind)
    if missing is not None:
        raise ValueError(missing)
    if backend != "auto":
        return backend
    preferred = {"cuda": "triton", "cpu": "cpu"}.get(kind, "torch")
    return preferred if unavailable(preferred, kind) is None else "torch"


def resolve_for(backend: str, x: torch.Tensor) -> str:
    """`resolve_backend` for a tensor: "auto" is torch for a dtype that the kernels do not take.

    Raises ValueError when a kernel is asked for by name and cannot take x.
    """
    resolved = resolve_backend(backend, x.device)
    if x.dtype in KERNEL_DTYPES.get(resolved, (x.dtype,)):
        return resolved
    if backend != "auto":
        raise ValueError(f"backend: {backend!r} does not take tensors of {x.dtype}")
    return "torch"


def unavailable(backend: str, kind: str) -> str | None:
    """Why `backend` cannot run on devices of type `kind`, in one sentence; None when it can."""
    if backend not in BACKENDS:
        return f"backend: {backend!r} is not one of {', '.join(BACKENDS)}"
    if backend == "triton":
        if triton is None:
            return "backend: 'triton' needs the triton package, which is not installed"
        if kind != "cuda" and not (kind == "cpu" and TRITON_INTERPRETED):
            return f"backend: 'triton' needs tensors on a CUDA device, and these are on {kind!r}"
    if backend == "cpu":
        if kind != "cpu":
            return f"backend: 'cpu' needs tensors on the CPU, and these are on {kind!r}"
        if _cpu is None:
            return "backend: 'cpu' needs the C++ kernels, which this installation was built without"
    return None
