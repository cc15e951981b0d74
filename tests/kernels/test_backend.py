from __future__ import annotations

import pytest
import torch

from prototok_kernels import backend as module
from prototok_kernels.backend import resolve_backend


def test_auto_prefers_the_kernels_of_the_device(monkeypatch):
    monkeypatch.setattr(module, "_cpu", object())
    monkeypatch.setattr(module, "triton", object())
    assert resolve_backend("auto", "cpu") == "cpu"
    assert resolve_backend("auto", torch.device("cuda", 1)) == "triton"
    assert resolve_backend("auto", "mps") == "torch"


def test_auto_is_torch_where_the_kernels_are_missing(monkeypatch):
    monkeypatch.setattr(module, "_cpu", None)
    monkeypatch.setattr(module, "triton", None)
    assert resolve_backend("auto", "cpu") == "torch"
    assert resolve_backend("auto", "cuda") == "torch"


def test_an_explicit_request_is_met_or_raises(monkeypatch):
    monkeypatch.setattr(module, "TRITON_INTERPRETED", False)
    assert resolve_backend("torch", "cuda") == "torch"
    with pytest.raises(ValueError, match="backend: 'cpu' needs tensors on the CPU"):
        resolve_backend("cpu", "cuda")
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of"):
        resolve_backend("cuda", "cuda")
    monkeypatch.setattr(module, "_cpu", None)
    with pytest.raises(ValueError, match="backend: 'cpu' needs the C"):
        resolve_backend("cpu", "cpu")
    monkeypatch.setattr(module, "triton", object())
    with pytest.raises(ValueError, match="backend: 'triton' needs tensors on a CUDA device"):
        resolve_backend("triton", "cpu")
    monkeypatch.setattr(module, "triton", None)
    with pytest.raises(ValueError, match="backend: 'triton' needs the triton package"):
        resolve_backend("triton", "cuda")
