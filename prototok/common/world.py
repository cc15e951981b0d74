"""Keep the caller's torch settings out of a computation."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

_ROUNDED = ("tf32", "bf16")

P = ParamSpec("P")
R = TypeVar("R")


def own_world(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function as if nobody had changed torch's modes around it.

    Gradients can be taken under `torch.no_grad()` or `torch.inference_mode()`, `torch.autocast`
    changes no dtype, and products of float32 are those of float32 whatever
    `torch.set_float32_matmul_precision` allows, so that a result does not depend on where it was
    asked for. The caller's modes are back when the function returns.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch

        mkldnn: Any = torch.backends.mkldnn
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            _whole_products(mkldnn.matmul, torch.backends.cuda.matmul),
        ):
            return function(*args, **kwargs)

    return call


_pinning = threading.Lock()
_pinned: list[tuple[Any, str]] = []  # what products of float32 were allowed to be, by backend
_inside = 0


@contextmanager
def _whole_products(*backends: Any) -> Iterator[None]:
    """Let no product of float32 round its factors.

    That is a setting of the process: the first thread to come makes it, the last undoes it.
    """
    global _inside
    with _pinning:
        if not _inside:
            _pinned.extend((b, b.fp32_precision) for b in backends if b.fp32_precision in _ROUNDED)
            for backend, _ in _pinned:
                backend.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _pinning:
            _inside -= 1
            if not _inside:
                for backend, allowed in _pinned:
                    backend.fp32_precision = allowed
                _pinned.clear()
