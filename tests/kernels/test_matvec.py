"""A linear layer for few rows against float64, at awkward sizes and strides."""

from __future__ import annotations

import pytest
import torch

from prototok_kernels.backend import _cpu
from prototok_kernels.matvec import matvec_, matvec_ref_

needs_cpp = pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (1, 192, 320), (3, 37, 19), (2, 16, 8), (1, 0, 5)]
)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_error_is_that_of_one_rounding(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, add: bool, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, bias = draw(outputs, inputs), draw(outputs) if biased else None
    x = draw(rows, inputs + 3)[:, :inputs]
    whole = torch.full((rows, outputs + 2), float("nan"), dtype=dtype)
    out = whole[:, :outputs]
    before = draw(rows, outputs)
    out.copy_(before if add else torch.full_like(before, float("nan")))
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact += bias
    if add:
        exact += before
    matvec_(out, x, weight, bias, add=add, backend="cpu")
    bound = 2 * torch.finfo(dtype).eps * (exact.abs() + 1e-2 * max(1, inputs) ** 0.5)
    assert bool(((out - exact).abs() <= bound + 3e-7 * inputs).all())
    assert bool(whole[:, outputs:].isnan().all())


@needs_cpp
def test_instruction_sets_agree() -> None:
    x, weight = torch.randn(2, 45), torch.randn(21, 45)
    found = []
    for name in _cpu.instruction_sets():
        out = torch.empty(2, 21)
        _cpu.matvec(
            weight.data_ptr(), x.data_ptr(), 0, out.data_ptr(), 2, 45, 21, 45, 21, False, False, 1,
            name,
        )  # fmt: skip
        found.append(out)
    for out in found:
        torch.testing.assert_close(out, x @ weight.T)


def test_torch_is_the_reference() -> None:
    x, weight, bias = torch.randn(7, 5), torch.randn(3, 5), torch.randn(3)
    for add in (False, True):
        for b in (None, bias):
            one, other = torch.ones(7, 3), torch.ones(7, 3)
            matvec_(one, x, weight, b, add=add, backend="torch")
            matvec_ref_(other, x, weight, b, add=add)
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("weight", "backend", "message"),
    [
        (torch.zeros(3, 4), "auto", "weight: must be"),
        (torch.zeros(3, 5), "gpu", "backend: 'gpu' is not one of"),
        (torch.zeros(3, 5).double(), "cpu", "x: torch.float32 is not the dtype of"),
        (torch.zeros(5, 3).T, "cpu", "weight: must be contiguous"),
    ],
)
def test_what_cannot_be_met_is_named(weight: torch.Tensor, backend: str, message: str) -> None:
    if backend == "cpu" and _cpu is None:
        pytest.skip("installed without the C++ kernels")
    with pytest.raises(ValueError, match=message):
        matvec_(torch.zeros(1, 3), torch.zeros(1, 5), weight, backend=backend)
