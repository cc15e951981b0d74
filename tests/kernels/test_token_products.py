"""Products of few rows with what stands around them. Letters: R rows, d hidden size, O outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from against_fp64 import assert_as_close_as_torch
from prototok_kernels import normed_products as module
from prototok_kernels.added_products import add_products_, add_products_ref_
from prototok_kernels.normed_products import (
    NormedProduct,
    normed_products,
    normed_products_ref,
    outputs_a_program,
    warps_of,
)

SHAPES = [(1, 33, 17), (4, 70, 9), (2, 1, 1)]  # (R, d, O)
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.fixture(autouse=True)
def several_outputs_a_program(monkeypatch):
    """As real launches have; one alone would hide a mistake in the order."""
    monkeypatch.setattr(module, "_PROGRAMS", 1)


class Numbers:
    """Numbers that `dtype` holds exactly."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self.generator) / shape[-1] ** (len(shape) - 1) ** 0.5
        return made.to(self.dtype).to(self.device)


def cast(value, dtype):
    if isinstance(value, Tensor):
        return value.to(dtype)
    return tuple(cast(one, dtype) for one in value) if isinstance(value, tuple) else value


def of_kind(kind: str, d: int, o: int, number: Numbers) -> list[NormedProduct]:
    rms, layer = (2 * number(d), None), (number(d), number(d))
    return {
        "qkv of Llama": [NormedProduct(rms, number(o, d))],
        "qkv of Qwen2": [NormedProduct(rms, number(o, d), number(o))],
        "gated": [NormedProduct(rms, number(2 * o, d), None, "silu", True)],
        "gated, biases": [NormedProduct(rms, number(2 * o, d), number(2 * o), "gelu", True)],
        "parallel": [
            NormedProduct(layer, number(o, d), number(o)),
            NormedProduct((number(d), number(d)), number(3 * o, d), None, "gelu_new"),
        ],
    }[kind]


KINDS = ("qkv of Llama", "qkv of Qwen2", "gated", "gated, biases", "parallel")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_normed_products_are_as_close_to_fp64_as_torch(triton_device, kind, shape, dtype):
    rows, d, o = shape
    number = Numbers(dtype, triton_device)
    x, products = 3 * number(rows, d), of_kind(kind, d, o, number)

    def exactly(product):
        values = {name: cast(value, torch.float64) for name, value in vars(product).items()}
        return NormedProduct(**values)

    assert_as_close_as_torch(
        [t.cpu() for t in normed_products(x, products, EPS)],
        [t.cpu() for t in normed_products_ref(x, products, EPS)],
        [t.cpu() for t in normed_products_ref(x.double(), [*map(exactly, products)], EPS)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["one", "one with bias", "two"])
def test_added_products_are_as_close_to_fp64_as_torch(triton_device, kind, shape, dtype):
    rows, d, o = shape
    number = Numbers(dtype, triton_device)
    x = number(rows, d)
    products = [(number(rows, o), number(d, o), None if kind == "one" else number(d))]
    if kind == "two":
        products.append((number(rows, 3 * o), number(d, 3 * o), number(d)))
    found, torchs, exact = x.clone(), x.clone(), x.double()
    add_products_(found, products)
    add_products_ref_(torchs, products)
    add_products_ref_(exact, [cast(product, torch.float64) for product in products])
    assert_as_close_as_torch([found.cpu()], [torchs.cpu()], [exact.cpu()])


def test_a_row_is_the_same_alone(triton_device):
    """What a text gives must not depend on who comes with it."""
    number = Numbers(torch.bfloat16, triton_device)
    x, products = number(3, 64), of_kind("parallel", 64, 24, number)
    together = normed_products(x, products, EPS)
    alone = normed_products(x[1:2].clone(), products, EPS)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_no_rows_and_weights_that_lie_across(triton_device):
    number = Numbers(torch.float32, triton_device)
    norm, across = (number(8), None), number(8, 5).T
    (empty,) = normed_products(number(0, 8), [NormedProduct(norm, across)], EPS)
    assert empty.shape == (0, 5)
    x = number(2, 8)
    found = normed_products(x, [NormedProduct(norm, across)], EPS)
    wanted = normed_products(x, [NormedProduct(norm, across.contiguous())], EPS)
    assert torch.equal(found[0], wanted[0])
    add_products_(number(0, 5), [(number(0, 8), across, None)])


def test_real_launches_have_programs_for_all_processors_and_fit_registers(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.undo()
    for outputs, inputs in ((3072, 2048), (2048, 2048), (2048, 8192), (768, 1024 + 4096)):
        out = outputs_a_program(outputs, 2 * inputs)
        assert outputs // out >= 256 and out * inputs * 2 <= 1 << 15
        assert out * inputs / (32 * warps_of(out * inputs)) <= 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(6, 7)}, r"^weight: must be \(6, 8\) of torch.float32"),
        ({"bias": torch.zeros(5)}, r"^bias: must be \(6,\)"),
        ({"norm": (torch.zeros(7), None)}, r"^norm: must be \(8,\)"),
        ({"weight": torch.zeros(6, 8).half()}, "^weight: must be .* saw .* of torch.float16"),
        ({"weight": torch.zeros(5, 8), "gated": True}, "^weight: a gated one has two halves"),
    ],
)
def test_names_what_does_not_fit(triton_device, changes, message):
    options = {"norm": (torch.ones(8), None), "weight": torch.zeros(6, 8)} | changes
    given = {
        name: value.to(triton_device) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    given["norm"] = (given["norm"][0].to(triton_device), None)
    with pytest.raises(ValueError, match=message):
        normed_products(torch.ones(2, 8, device=triton_device), [NormedProduct(**given)], EPS)


def test_names_what_cannot_be_added(triton_device):
    x = torch.ones(2, 8, device=triton_device)
    for given, message in (
        ((torch.ones(2, 5), torch.ones(8, 4), None), r"^weight: must be \(8, 5\)"),
        ((torch.ones(3, 5), torch.ones(8, 5), None), r"^inputs: must be \(2, 5\)"),
        ((torch.ones(2, 5), torch.ones(8, 5), torch.ones(5)), r"^bias: must be \(8,\)"),
    ):
        tensors = tuple(None if t is None else t.to(triton_device) for t in given)
        with pytest.raises(ValueError, match=message):
            add_products_(x, [tensors])
    with pytest.raises(ValueError, match="^x: must be contiguous"):
        add_products_(x.T, [])
