"""Keep the caller's torch settings out of a computation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def own_world(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function as if nobody had changed torch's modes around it.

    Gradients can be taken under `torch.no_grad()` or `torch.inference_mode()`, and
    `torch.autocast` changes no dtype, so that a result does not depend on where it was asked for.
    The caller's modes are back when the function returns.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch

        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return call
