"""Letters: R rows, d hidden size."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from against_fp64 import assert_as_close_as_torch, with_gradients
from prototok_kernels import residual_norm as module
from prototok_kernels.residual_norm import (
    residual_norm,
    residual_norm_ref,
    two_residual_norms,
)

SHAPES = [(0, 8), (1, 5), (3, 7), (2, 16), (5, 33), (4, 192), (3, 1027)]  # (R, d)
EPS = 1e-5


def make(shape, dtype, device, centred):
    """x, delta and the norm's weight and bias, in numbers that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(shape[0] * 1009 + shape[1])
    x, delta = (2 * torch.randn(shape, generator=generator) + 0.5 for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    x, delta, weight, bias = (t.to(dtype).to(device) for t in (x, delta, weight, bias))
    return x, delta, weight, bias if centred else None


def three_ways(shape, dtype, device, backend, centred, with_delta):
    x, delta, weight, bias = make(shape, dtype, device, centred)
    inputs = (x, delta) if with_delta else (x,)

    def run(function, dtype, *tensors):
        frozen = [None if t is None else t.to(dtype) for t in (weight, bias)]
        stream, added = tensors if with_delta else (*tensors, None)
        return function(stream, added, *frozen, EPS)

    def way(function, dtype):
        return with_gradients(functools.partial(run, function, dtype), inputs, dtype)

    ours = functools.partial(residual_norm, backend=backend)
    return (
        way(ours, dtype),
        way(residual_norm_ref, dtype),
        way(residual_norm_ref, torch.float64),
    )


@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "alone"])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_close_to_fp64_as_torch(backend, device, shape, dtype, centred, with_delta):
    assert_as_close_as_torch(*three_ways(shape, dtype, device, backend, centred, with_delta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(instruction_set, dtype, monkeypatch):
    _cpu = module._cpu
    chosen = SimpleNamespace(
        residual_norm=functools.partial(_cpu.residual_norm, instruction_set=instruction_set),
        residual_norm_backward=functools.partial(
            _cpu.residual_norm_backward, instruction_set=instruction_set
        ),
    )
    monkeypatch.setattr(module, "_cpu", chosen)
    assert_as_close_as_torch(*three_ways((5, 83), dtype, "cpu", "cpu", True, True))


def test_one_gradient_may_be_missing(backend, device):
    """The last norm's sum is not read, and a stream may go on without its norm."""
    x, delta, weight, bias = make((4, 33), torch.float32, device, True)
    x, delta = x.requires_grad_(), delta.requires_grad_()
    for index in (0, 1):
        found, wanted = (
            torch.autograd.grad(f(x, delta, weight, bias, EPS)[index].square().sum(), (x, delta))
            for f in (functools.partial(residual_norm, backend=backend), residual_norm_ref)
        )
        torch.testing.assert_close(found, wanted)


def test_the_frozen_weights_get_no_gradient(backend, device):
    x, delta, weight, bias = make((4, 33), torch.float32, device, True)
    total, normed = residual_norm(x.requires_grad_(), delta, weight, bias, EPS, backend)
    (total.sum() + normed.sum()).backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


def test_gradcheck_of_the_reference():
    x, delta, weight, bias = (
        t.double() for t in make((2, 5), torch.float32, torch.device("cpu"), True)
    )
    x, delta = x.requires_grad_(), delta.requires_grad_()
    for b in (None, bias):
        assert torch.autograd.gradcheck(
            lambda x, d, b=b: residual_norm_ref(x, d, weight, b, EPS), (x, delta)
        )


def two_ref(x, delta, first, second, eps):
    total, one = residual_norm_ref(x, delta, *first, eps)
    return total, one, residual_norm_ref(total, None, *second, eps)[1]


def norms_of(shape, dtype, device, centred):
    """Two norms that are not alike."""
    _, _, weight, bias = make(shape, dtype, device, True)
    pairs = (weight, bias), (bias + 1, weight)
    return [(w, b if centred else None) for w, b in pairs]


@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "alone"])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_norms_of_one_sum(backend, device, shape, dtype, centred, with_delta):
    x, delta, *_ = make(shape, dtype, device, True)
    norms = norms_of(shape, dtype, device, centred)

    def run(function, dtype, stream, added=None):
        frozen = [tuple(None if t is None else t.to(dtype) for t in norm) for norm in norms]
        return function(stream, added, *frozen, EPS)

    def way(function, dtype):
        inputs = (x, delta) if with_delta else (x,)
        return with_gradients(functools.partial(run, function, dtype), inputs, dtype)

    ours = functools.partial(two_residual_norms, backend=backend)
    assert_as_close_as_torch(way(ours, dtype), way(two_ref, dtype), way(two_ref, torch.float64))


def test_of_two_norms_one_may_be_unused(backend, device):
    x, delta, *_ = make((4, 33), torch.float32, device, True)
    norms = norms_of((4, 33), torch.float32, device, True)
    x, delta = x.requires_grad_(), delta.requires_grad_()
    for index in (0, 1, 2):
        found, wanted = (
            torch.autograd.grad(f(x, delta, *norms, EPS)[index].square().sum(), (x, delta))
            for f in (functools.partial(two_residual_norms, backend=backend), two_ref)
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["delta", "weight", "bias"])
def test_names_what_does_not_fit(name):
    x, delta, weight, bias = make((2, 8), torch.float32, "cpu", True)
    arguments = {"delta": delta, "weight": weight, "bias": bias}
    arguments[name] = arguments[name][..., :5]
    with pytest.raises(ValueError, match=f"{name}: must be"):
        residual_norm(x, **arguments, eps=EPS, backend="torch")
