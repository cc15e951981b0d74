"""Letters: R rows, I inner size."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from against_fp64 import assert_as_close_as_torch, with_gradients
from prototok_kernels import activation as module
from prototok_kernels.activation import (
    ACTIVATIONS,
    activation,
    activation_backward,
    activation_ref,
)

SHAPES = [(0, 8), (1, 1), (3, 7), (2, 16), (5, 83), (2, 1029)]  # (R, I)
NAMES = ["silu", "gelu", "gelu_new", "relu"]
DTYPES = [torch.float32, torch.bfloat16]


def make(rows, inner, gated, dtype, device):
    generator = torch.Generator().manual_seed(rows * 1009 + inner)
    wide = 2 * inner if gated else inner
    z = 4 * torch.randn(rows, wide, generator=generator)
    bias = torch.randn(wide, generator=generator)
    return z.to(dtype).to(device), bias.to(dtype).to(device)


def three_ways(z, bias, name, gated, backend):
    def way(function, dtype):
        run = functools.partial(
            function, bias=None if bias is None else bias.to(dtype), name=name, gated=gated
        )
        return with_gradients(run, [z], dtype)

    ours = functools.partial(activation, backend=backend)
    return (
        way(ours, z.dtype),
        way(activation_ref, z.dtype),
        way(activation_ref, torch.float64),
    )


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "single"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_close_to_fp64_as_torch(backend, device, dtype, name, gated, with_bias):
    for shape in SHAPES:
        z, bias = make(*shape, gated, dtype, device)
        ways = three_ways(z, bias if with_bias else None, name, gated, backend)
        assert_as_close_as_torch(*ways)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(instruction_set, dtype, name, monkeypatch):
    chosen = functools.partial(module._cpu.activation, instruction_set=instruction_set)
    monkeypatch.setattr(module, "_cpu", SimpleNamespace(activation=chosen))
    z, bias = make(5, 83, True, dtype, "cpu")
    assert_as_close_as_torch(*three_ways(z, bias, name, True, "cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_tails_and_edges(backend, device, name):
    """Far out both value and slope are exact limits, in between every binade is right."""
    size = torch.cat([torch.logspace(-20, 4, 2000), torch.tensor([0.0, 3e4, 1e30])])
    z = torch.cat([size, -size]).to(device)
    if backend == "torch":
        pytest.skip("torch's own")
    out, grad = (t.double() for t in three_ways(z[None], None, name, False, backend)[0])
    wanted, slope = three_ways(z[None], None, name, False, "torch")[2]
    slope = grad / slope  # both carry the same factor of a probe
    size = z.cpu().double().abs()
    assert ((out - wanted).abs() <= 6e-7 * wanted.abs() + 3e-7 * size.clamp(max=40)).all()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "single"])
def test_backward_by_itself_is_that_of_autograd(backend, device, gated):
    z, bias = make(3, 19, gated, torch.float32, device)
    z = z.requires_grad_()
    out = activation_ref(z, bias, "gelu", gated)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    (wanted,) = torch.autograd.grad(out, z, grad)
    found = activation_backward(grad, z.detach(), bias, "gelu", gated, backend)
    torch.testing.assert_close(found, wanted)


def test_triton_keeps_the_digits_of_a_small_gelu(triton_device):
    """Where 1 + erf cancels, torch's own in float32 has one digit left."""
    x = torch.linspace(-5.0, -3.0, 501, dtype=torch.float64)
    wanted = x * torch.special.erfc(-x / 2**0.5) / 2
    found = activation(x.float().to(triton_device)[None], None, "gelu", False, "triton")
    assert float((found[0].cpu().double() / wanted - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new"])
def test_the_slope_far_out_is_one(backend, device, name):
    z = torch.tensor([[1e3, 1e8, 1e15]]).to(device)
    grad = torch.ones_like(z)
    assert activation_backward(grad, z, None, name, False, backend).tolist() == [[1.0, 1.0, 1.0]]


def test_nan_stays_nan(backend, device):
    z = torch.tensor([[float("nan"), 1.0]]).to(device)
    for name in NAMES:
        out = activation(z, None, name, False, backend).cpu()
        assert out[0, 0].isnan() and out[0, 1] > 0


def test_gradcheck_of_the_reference():
    z = torch.randn(2, 6, dtype=torch.float64).requires_grad_()
    for name in set(ACTIVATIONS) - {"relu"}:
        assert torch.autograd.gradcheck(lambda z, n=name: activation_ref(z, None, n, True), z)


def test_names_what_does_not_fit():
    z = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="name: 'tanh' is not one of"):
        activation(z, None, "tanh", False, "torch")
    with pytest.raises(ValueError, match="z: a gated row must have two halves"):
        activation(z, None, "silu", True, "torch")
    with pytest.raises(ValueError, match="bias: must be"):
        activation(z, torch.zeros(4), "silu", False, "torch")
