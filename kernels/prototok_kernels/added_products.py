"""Products of one token's few rows, added to the stream: the end of a block, in one launch.

As in normed_products.py a program holds its weights whole. Two products that end in the same stream
(`o` and `down` of a parallel GPT-NeoX block) are one launch.

Letters: R rows, d hidden size, I inputs of a product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prototok_kernels.backend import early, require
from prototok_kernels.normed_products import outputs_a_program, require_like, warps_of

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _added_product_kernel(  # type: ignore[no-untyped-def]
        x,  # (R, OUT), read and written
        inputs,  # (R, SIZE)
        weight,  # (OUT, SIZE)
        bias,  # (OUT,); read only with HAS_BIAS
        second_inputs,  # and of a second product; used only where SECOND_SIZE is not 0
        second_weight,
        second_bias,
        R: tl.constexpr,
        OUT: tl.constexpr,
        SIZE: tl.constexpr,
        SECOND_SIZE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        SECOND_HAS_BIAS: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK: tl.constexpr,  # ≥ SIZE
        SECOND_BLOCK: tl.constexpr,  # ≥ SECOND_SIZE
        EARLY: tl.constexpr,
    ):
        output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        there = output < OUT
        down = output[:, None].to(tl.int64)
        column = tl.arange(0, BLOCK)
        mask = there[:, None] & (column[None, :] < SIZE)
        held = tl.load(weight + down * SIZE + column[None, :], mask=mask, other=0.0)
        if SECOND_SIZE > 0:
            across = tl.arange(0, SECOND_BLOCK)
            mask = there[:, None] & (across[None, :] < SECOND_SIZE)
            more = tl.load(second_weight + down * SECOND_SIZE + across[None, :], mask=mask, other=0)
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        for row in tl.static_range(R):
            h = tl.load(inputs + row * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
            value = tl.sum(held.to(tl.float32) * h[None, :], 1)
            if HAS_BIAS:
                value += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
            if SECOND_SIZE > 0:
                of_row = second_inputs + row * SECOND_SIZE + across
                h = tl.load(of_row, mask=across < SECOND_SIZE, other=0.0).to(tl.float32)
                value += tl.sum(more.to(tl.float32) * h[None, :], 1)
                if SECOND_HAS_BIAS:
                    value += tl.load(second_bias + output, mask=there, other=0.0).to(tl.float32)
            at = x + row * OUT + output
            value += tl.load(at, mask=there, other=0.0).to(tl.float32)
            tl.store(at, value.to(x.dtype.element_ty), mask=there)


Product = tuple[Tensor, Tensor, Tensor | None]  # inputs (R, I), weight (d, I), bias (d,)


def add_products_(x: Tensor, products: Sequence[Product]) -> None:
    """Add inputs @ weight.T + bias of each product, one or two, to x (R, d), in one Triton launch.

    Every row reads the weights from registers, so R is to be small. Arithmetic is fp32, rounded
    once. No gradient.

    Raises ValueError for a shape or dtype that does not fit, or where Triton does not run.
    """
    require("triton", x)
    if not x.is_contiguous():
        raise ValueError("x: must be contiguous, since it is written")
    for product in products:
        _check(x, *product)
    rows, outputs = x.shape
    if rows == 0:
        return
    (inputs, _, bias), (second_inputs, _, second_bias) = products[0], products[-1]
    second = second_inputs.shape[1] if len(products) == 2 else 0
    blocks = [triton.next_power_of_2(size) for size in (inputs.shape[1], max(1, second))]
    deep = blocks[0] + blocks[1] * (second > 0)
    block_out = outputs_a_program(outputs, deep * x.element_size())

    def tensors(product: Product) -> list[Tensor]:
        return [x if one is None else one.contiguous() for one in product]

    with torch.cuda.device_of(x):
        _added_product_kernel[(triton.cdiv(outputs, block_out),)](
            x, *tensors(products[0]), *tensors(products[-1]), R=rows, OUT=outputs,
            SIZE=inputs.shape[1],
            SECOND_SIZE=second, HAS_BIAS=bias is not None, SECOND_HAS_BIAS=second_bias is not None,
            BLOCK_OUT=block_out, BLOCK=blocks[0], SECOND_BLOCK=blocks[1],
            num_warps=warps_of(block_out * deep), enable_fp_fusion=True, **early(x),
        )  # fmt: skip


def _check(x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    rows, outputs = x.shape
    size = inputs.shape[-1]
    require_like(
        x, ("inputs", inputs, (rows, size)), ("weight", weight, (outputs, size)),
        ("bias", bias, (outputs,)),
    )  # fmt: skip


def add_products_ref_(x: Tensor, products: Sequence[Product]) -> None:
    """Compute the same by torch's products."""
    for inputs, weight, bias in products:
        x.addmm_(inputs, weight.T)
        if bias is not None:
            x += bias
