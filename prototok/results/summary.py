"""A fit in one line."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from prototok.common.shown import count


class Fitted(Protocol):
    """What fits of both kinds have; every tensor is (T, S)."""

    @property
    def exact(self) -> Tensor: ...

    @property
    def failed(self) -> Tensor: ...

    @property
    def steps(self) -> Tensor: ...


def summary_of(fit: Fitted) -> str:
    """Return a line such as "2 texts × 2 seeds, 4/4 exact, median 38 steps"."""
    texts, seeds = fit.exact.shape
    line = f"{count(texts, 'text')} × {count(seeds, 'seed')}"
    if not fit.exact.numel():
        return line
    failed = int(fit.failed.sum())
    lost = f"{failed} failed, " if failed else ""
    return (
        f"{line}, {int(fit.exact.sum())}/{fit.exact.numel()} exact, {lost}"
        f"median {int(fit.steps.median())} steps"
    )
