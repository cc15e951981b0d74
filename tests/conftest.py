"""Models that many tests use, loaded once; and Triton's interpreter where there is no GPU.

Beside others (`pytest -n 2`) a process of tests, and what it starts, computes on one thread: two
threads of torch wait for each other as soon as a third wants their cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    # Triton decorates its own functions when it is imported, which transformers may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import prototok
from prototok import FrozenLM
from prototok_kernels import plan as planning
from support import DEVICES, small_llama


@pytest.fixture(scope="session")
def small_lm() -> FrozenLM:
    """A random Llama of 97 tokens in float32: quick, and hard to fit beyond a few tokens."""
    return prototok.load(small_llama(), device="cpu", dtype="float32")


@pytest.fixture(scope="session", params=DEVICES)
def any_lm(request: pytest.FixtureRequest) -> FrozenLM:
    """The same on each kind of device there is."""
    return prototok.load(small_llama(), device=request.param, dtype="float32")


@pytest.fixture
def closed_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans on the CPU that take the first layer's closed form however few positions there are."""
    monkeypatch.setattr(planning, "FEW_ON_CPU", dict.fromkeys(planning.FEW_ON_CPU, 0))
    planning._plan_of.cache_clear()
    yield
    planning._plan_of.cache_clear()


@pytest.fixture(scope="session")
def tiny_lm() -> FrozenLM:
    """The built-in Llama, as a user gets it, on the CPU."""
    return prototok.load("tiny-llama", device="cpu")
