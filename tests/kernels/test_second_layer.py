"""The second block's products from the span of the first, against those at every position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prototok
from against_fp64 import assert_as_close_as_torch, with_gradients
from plans import plan_for
from prototok.model.families.body import DecoderBody
from prototok_kernels import packed
from prototok_kernels.backend import this_machine, unavailable
from prototok_kernels.layers import inner_activation
from prototok_kernels.pair.first_layer import first_layer_spanned
from prototok_kernels.pair.second_layer import (
    second_layer_projections,
    second_layer_projections_ref,
)
from zoo import OWN, made

PARALLEL = [name for name in OWN if name.startswith("gpt-neox") and "sequential" not in name]
ROWS = 5
SHORTEST = 19  # four heads, so six spanning vectors


def body_of(name: str, dtype: torch.dtype, device: str = "cpu") -> DecoderBody:
    """The model's blocks, with rotary tables in float64 where the blocks are."""
    body = prototok.load(made(OWN[name]), device=device, dtype=dtype).body
    assert isinstance(body, DecoderBody)
    if dtype == torch.float64:
        angle = torch.outer(torch.arange(64).double(), body.rotary.inv_freq.double()).repeat(1, 2)
        body.rotary._tables = angle.cos(), angle.sin()
    return body


def vectors(
    width: int, groups: int | None, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """e, m and the row of m that each row reads."""
    generator = torch.Generator().manual_seed(3)
    e = torch.randn(rows, width, generator=generator)
    m = torch.randn(groups or rows, width, generator=generator)
    return e, m, None if groups is None else torch.arange(rows) % groups


def pair(
    body: DecoderBody, group: Tensor | None, length: int, backend: str, device: str = "cpu"
) -> Callable[..., Tensor]:
    group = None if group is None else group.to(device)

    def run(e: Tensor, m: Tensor) -> Tensor:
        plan = plan_for(body.layers, len(e), length, backend)
        return body.hidden_of_pair(e.to(device), m.to(device), group, length, plan)

    return run


def laid_out(
    body: DecoderBody, group: Tensor | None, length: int, backend: str, device: str = "cpu"
) -> Callable[..., Tensor]:
    def run(e: Tensor, m: Tensor) -> Tensor:
        m = m if group is None else m[group]
        x = torch.cat([e[:, None], m[:, None].expand(-1, length - 1, -1)], dim=1)
        plan = plan_for(body.layers, len(x), length, backend, pair=False)
        return body.hidden(x.to(device, body.norm.dtype), plan)

    return run


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("name", PARALLEL)
def test_equal_the_products_at_every_position(name: str, length: int, groups: int | None) -> None:
    """Forward and gradients, those of the stream x beside them included."""
    body = body_of(name, torch.float64)
    e, m, group = vectors(body.norm.numel(), groups)
    plan = plan_for(body.layers, ROWS, length, "torch")

    def run(e: Tensor, m: Tensor, ref: bool) -> tuple[Tensor, ...]:
        first, second = body.layers[:2]
        x, coef, span = first_layer_spanned(e, m, group, length, first, *body.rotary(length), plan)
        if ref:
            return x, *second_layer_projections_ref(x, second)
        return x, *second_layer_projections(x, coef, span, second)

    found, expected = (
        with_gradients(lambda e, m, ref=ref: run(e, m, ref), [e, m], torch.float64)
        for ref in (False, True)
    )
    for f, x in zip(found, expected, strict=True):
        torch.testing.assert_close(f, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("name", PARALLEL)
def test_the_model_is_the_general_one(name: str, groups: int | None) -> None:
    body = body_of(name, torch.float64)
    e, m, group = vectors(body.norm.numel(), groups)
    for length in (SHORTEST - 1, SHORTEST, 40):
        taken = plan_for(body.layers, len(e), length, "torch").second_layer.taken
        assert (taken == "span") == (length >= SHORTEST)
        found, expected = (
            with_gradients(way(body, group, length, "torch"), [e, m], torch.float64)
            for way in (pair, laid_out)
        )
        for f, x in zip(found, expected, strict=True):
            torch.testing.assert_close(f, x, rtol=1e-9, atol=1e-9)


def errors_are_no_larger(
    name: str, length: int, groups: int | None, dtype: torch.dtype, backend: str,
    device: str = "cpu", rows: int = ROWS,
) -> DecoderBody:  # fmt: skip
    """Assert it of hidden states and gradients, for the body that is returned."""
    body, exact_body = body_of(name, dtype, device), body_of(name, torch.float64)
    e, m, group = vectors(body.norm.numel(), groups, rows)
    found, general = (
        with_gradients(way(body, group, length, backend, device), [e, m], torch.float32)
        for way in (pair, laid_out)
    )
    exact = with_gradients(laid_out(exact_body, group, length, "torch"), [e, m], torch.float64)
    assert_as_close_as_torch(found, general, exact)
    return body


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "groups"), [(SHORTEST, None), (60, 2)])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", PARALLEL)
def test_errors_are_no_larger_than_those_of_the_general_way(
    name: str, backend: str, length: int, groups: int | None, dtype: torch.dtype
) -> None:
    """A model of three blocks, so that the C++ op has one behind the one that takes products."""
    missing = unavailable(backend, "cpu")
    if missing:
        pytest.skip(missing)
    body = errors_are_no_larger(name, length, groups, dtype, backend)
    if backend == "cpu" and dtype == torch.bfloat16 and this_machine().packed:
        assert body._blocks in packed._packed


@pytest.mark.parametrize(
    ("name", "dtype"), [(PARALLEL[0], torch.bfloat16), ("gpt-neox, tanh gelu", torch.float32)]
)
def test_triton(name: str, dtype: torch.dtype) -> None:
    """Few cases: Triton's interpreter is slow."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = errors_are_no_larger(name, SHORTEST, 2, dtype, "triton", device, rows=2)
    assert plan_for(body.layers, 2, SHORTEST, "triton").second_layer.taken == "combined"


@pytest.mark.parametrize("front", [0, 1])
def test_activated_within_the_combination_it_is_the_same(front: int) -> None:
    """The inner activations and all gradients, behind a prefix as well."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = body_of(PARALLEL[0], torch.float32, device)
    if front:
        body = body.behind(torch.randn(front, body.norm.numel(), device=device))
    first, second = body.layers[:2]
    e, m, _ = vectors(body.norm.numel(), None, rows=2)
    tables = body.tables(SHORTEST)
    plan = plan_for(body.layers, 2, SHORTEST, "triton")

    def run(e: Tensor, m: Tensor, activated: bool) -> tuple[Tensor, ...]:
        x, coef, span = first_layer_spanned(e, m, None, SHORTEST, first, *tables, plan)
        qkv, up = second_layer_projections(x, coef, span, second, activated)
        return x, qkv, up if activated else inner_activation(up, second.up_bias, second, "torch")

    found, expected = (
        with_gradients(partial(run, activated=a), [e.to(device), m.to(device)], torch.float32)
        for a in (True, False)
    )
    for f, x in zip(found, expected, strict=True):
        torch.testing.assert_close(f, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_only_two_parallel_blocks_collapse() -> None:
    parallel = body_of("gpt-neox, parallel", torch.float32).layers
    sequential = body_of("gpt-neox, sequential", torch.float32).layers
    llama = body_of("llama, grouped, tied", torch.float32).layers
    assert plan_for(parallel, 3, 60, "torch").second_layer.taken == "span"
    for layers in (parallel[:1], sequential, llama, [parallel[0], sequential[1]]):
        assert plan_for(layers, 3, 60, "torch").second_layer.taken == "in full"


class Largest(TorchDispatchMode):
    """The most elements of anything that is computed (views left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, t.numel())
        return out


def test_nothing_is_larger_than_the_products() -> None:
    """No copies of a weight for each row, for one: a batched product makes them unasked."""
    body, length = body_of("gpt-neox, parallel", torch.float32), SHORTEST
    e, m, _ = vectors(body.norm.numel(), None)
    first, second = body.layers[:2]
    plan = plan_for(body.layers, ROWS, length, "torch")
    x, coef, span = (
        t.detach().requires_grad_()
        for t in first_layer_spanned(e, m, None, length, first, *body.rotary(length), plan)
    )
    with Largest() as seen:
        qkv, z = second_layer_projections(x, coef, span, second)
        torch.autograd.grad([qkv.sum(), z.sum()], [coef, span])
    assert seen.elements == max(qkv.numel(), z.numel()) < ROWS * second.qkv.numel()


def test_products_of_another_block_are_refused() -> None:
    body, llama = (body_of(n, torch.float32) for n in ("gpt-neox, parallel", "qwen2"))
    width, tables = body.norm.numel(), body.rotary(7)
    x, qkv = torch.randn(2, 7, width), torch.randn(2, 7, 3 * width)
    with pytest.raises(ValueError, match=r"projected: must be \(2, 7, 80\) of torch.float32, saw"):
        body._blocks(x, *tables, plan_for(body.layers, 2, 7, "torch"), 1, (qkv, qkv))
    with pytest.raises(ValueError, match="projected: only a block with a parallel residual"):
        plan = plan_for(llama.layers, 2, 7, "torch")
        llama._blocks(x, *llama.rotary(7), plan, 1, (qkv, qkv))
