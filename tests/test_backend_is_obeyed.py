"""`backend="torch"` runs no line of C++, and gives the numbers that torch gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import prototok
from prototok import FrozenLM, autoregressive
from prototok.fitting.engine import basis
from prototok_kernels.backend import _cpu

needs_cpp = pytest.mark.skipif(_cpu is None, reason="needs the C++ kernels")


class Raising:
    """Stands in for the C++ extension."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the C++ kernels were asked for {name}")


@pytest.fixture
def without_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The C++ extension raises wherever it is used; nothing it has made is kept."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("prototok", "prototok_kernels") and hasattr(module, "_cpu"):
            monkeypatch.setattr(module, "_cpu", Raising())
    yield


def fresh(dtype: str = "bfloat16") -> FrozenLM:
    return prototok.load("tiny-llama", device="cpu", dtype=dtype)


TEXTS = ["Call me Ishmael.", "It was the best of times"]
FEW_STEPS = prototok.Recipe(max_steps=6, margin=0.2)
CALLS = {
    "pair": lambda lm: prototok.fast_fit(
        lm, TEXTS, length=4, recipe=FEW_STEPS, backend="torch"
    ).tokens.e,
    "one vector": lambda lm: prototok.fast_fit(
        lm, TEXTS, length=4, arrangement="e*", recipe=FEW_STEPS, backend="torch"
    ).tokens.e,
    "shared m": lambda lm: prototok.fast_fit(
        lm, TEXTS, length=4, share="m", recipe=FEW_STEPS, backend="torch"
    ).tokens.m,
    "[mem]": lambda lm: autoregressive.fit(
        lm, TEXTS, length=4, recipe=FEW_STEPS, backend="torch"
    ).mem,
    "generate": lambda lm: autoregressive.generate(
        lm, torch.ones(1, 1, lm.hidden_size), 4, backend="torch"
    ),
    "decode": lambda lm: prototok.decode(lm, fitted(lm).tokens, backend="torch"),
    "information": lambda lm: prototok.information(lm, TEXTS, backend="torch").nats,
    "capacity": lambda lm: prototok.capacity(
        lm, TEXTS, lengths=(1, 2), recipe=FEW_STEPS, backend="torch"
    ).exact,
    "learn_optimizer": lambda lm: prototok.learn_optimizer(
        lm, [[3, 4, 5], [6, 7, 8]], lengths=(2,), steps=2, backend="torch"
    ).weights["last.weight"],
    "learn_shared": lambda lm: prototok.learn_shared(
        lm, TEXTS, length=2, steps=3, backend="torch"
    ).mean,
    "interpolate": lambda lm: prototok.interpolate(
        lm, fitted(lm), [(0, 1)], points=3, backend="torch"
    ).accuracy,
    "connect": lambda lm: prototok.connect(
        lm, fitted(lm), [(0, 1)], points=3, backend="torch",
        settings=prototok.geometry.paths.BezierSettings(max_steps=2),
    ).control,
    "logits": lambda lm: lm.logits(torch.ones(1, 5, lm.hidden_size).to(lm.dtype), "torch"),
}  # fmt: skip


def fitted(lm: FrozenLM) -> prototok.FitResult:
    return prototok.fast_fit(
        lm, TEXTS[:1], length=3, seeds=2, recipe=FEW_STEPS, backend="torch"
    )  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("name", CALLS)
def test_no_public_call_with_backend_torch_runs_cpp(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A prior's eigenbasis takes minutes by torch's bf16 on a processor without AVX-512.
    monkeypatch.setattr(basis, "_STEPS", 3)
    expected = CALLS[name](fresh())
    request.getfixturevalue("without_cpp")
    assert torch.equal(CALLS[name](fresh()), expected)


@needs_cpp
@pytest.mark.usefixtures("without_cpp")
def test_the_stand_in_is_reached_by_backend_cpu() -> None:
    """Or the test above could not fail."""
    with pytest.raises(AssertionError, match="the C\\+\\+ kernels were asked for"):
        prototok.fast_fit(fresh(), TEXTS, length=4, recipe=FEW_STEPS, backend="cpu")


@needs_cpp
def test_provenance_says_what_ran() -> None:
    for backend, name in (("torch", "torch"), ("cpu", "cpu"), ("auto", "cpu")):
        fit = prototok.fast_fit(fresh(), TEXTS, length=4, recipe=FEW_STEPS, backend=backend)
        assert fit.tokens.provenance["backend"] == name
        assert f"update {name}" in fit.tokens.provenance["plan"]
