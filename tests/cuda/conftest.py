"""Each test runs on a GPU where there is one, and elsewhere with stand-ins, which try its body."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from fake_cuda import DECODING, FITTING, FakeCuda, stand_in, windows_of_cuda
from prototok.common import urgent


@dataclass(frozen=True)
class Where:
    """A device, and the backend of what is captured: stand-ins for graphs see torch alone."""

    device: str
    backend: str


@pytest.fixture(params=["cuda", "stand-ins"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    real = request.param == "cuda"
    if real != torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device" if real else "there is a CUDA device")
    if real:
        yield Where("cuda", "auto")
        return
    urgent._of_thread.streams.clear()
    stand_in(monkeypatch, FakeCuda(), *DECODING, *FITTING)
    windows_of_cuda(monkeypatch)
    yield Where("cpu", "torch")
    urgent._of_thread.streams.clear()
