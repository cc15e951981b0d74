"""Products of one token's few rows with the norm in front and the activation behind: one launch.

What a token costs is one reading of the weights. A program holds a tile of them, whole depth, in
its registers, so that all of its loads are under way at once; the norm of the row, which every
program makes again, and bias and activation cost nothing beside that. Two products that read the
same rows (q, k, v and the MLP's first of a parallel GPT-NeoX block) share the launch.

Letters: R rows, d hidden size, O outputs of a product, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.activation import ACTIVATIONS, activation
from prototok_kernels.backend import early, require
from prototok_kernels.layers import DecoderLayer, LlamaLayer, NeoXLayer, inner_projection
from prototok_kernels.residual_norm import Norm, residual_norm, two_residual_norms

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from prototok_kernels.activation import _value_and_slope
except ImportError:
    triton = None

# Weights that a program holds, bytes, the most outputs they are for, and programs that a launch
# should have: two for each processor. All keep enough loads under way to fill the bandwidth; the
# best of eight choices that an H200 timed (docs/dev/log.md).
_TILE, _MOST_OUTPUTS, _PROGRAMS = 1 << 15, 8, 256


@dataclass(frozen=True)
class NormedProduct:
    """norm(x) @ weight.T + bias, then the activation that a configuration calls `activation`."""

    norm: Norm  # (d,), and with LayerNorm (d,)
    weight: Tensor  # (O, d); gated (2 I, d), the half that is activated first
    bias: Tensor | None = None  # (O,)
    activation: str | None = None
    gated: bool = False

    @property
    def outputs(self) -> int:
        """Return O; I where the product is gated."""
        return len(self.weight) // (1 + self.gated)


def products_of(layer: DecoderLayer) -> tuple[NormedProduct, NormedProduct]:
    """Return what a block projects behind its two norms: q, k and v, and what its `down` reads."""
    first = second = None
    if isinstance(layer, NeoXLayer):
        first, second = layer.input_norm_bias, layer.post_norm_bias
    gated = isinstance(layer, LlamaLayer)
    return (
        NormedProduct((layer.input_norm, first), layer.qkv, layer.qkv_bias),
        NormedProduct(
            (layer.post_norm, second), *inner_projection(layer), layer.activation, gated
        ),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _one_product(  # type: ignore[no-untyped-def]
        program, x, norm, norm_bias, weight, bias, out, eps, R: tl.constexpr, D: tl.constexpr,
        OUT: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
        CENTRED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        output = program * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        column = tl.arange(0, BLOCK)
        there, inside = output < OUT, column < D
        at = output[:, None].to(tl.int64) * D + column[None, :]
        mask = there[:, None] & inside[None, :]
        # The weights first: they are long under way when the norm is ready, or the launch before
        # this one, which makes x.
        held = tl.load(weight + at, mask=mask, other=0.0)
        if GATED:
            wide: tl.constexpr = OUT * D
            held_up = tl.load(weight + wide + at, mask=mask, other=0.0)
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        for row in tl.static_range(R):
            h = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                h = tl.where(inside, h - tl.sum(h, 0) / D, 0.0)
            h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / D + eps)
            h *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
            if CENTRED:
                h += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.sum(held.to(tl.float32) * h[None, :], 1)
            if HAS_BIAS:
                value += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
            if KIND is not None:
                value, _ = _value_and_slope(value, KIND)
            if GATED:
                up = tl.sum(held_up.to(tl.float32) * h[None, :], 1)
                if HAS_BIAS:
                    up += tl.load(bias + OUT + output, mask=there, other=0.0).to(tl.float32)
                value *= up
            tl.store(out + row * OUT + output, value.to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _normed_product_kernel(  # type: ignore[no-untyped-def]
        x,  # (R, d)
        norm,  # (d,)
        norm_bias,  # (d,); read only with CENTRED
        weight,  # (OUT, d), gated (2 OUT, d)
        bias,  # (OUT,), gated (2 OUT,); read only with HAS_BIAS
        out,  # (R, OUT)
        second_norm,  # and of a second product; used only where SECOND_OUT is not 0
        second_norm_bias,
        second_weight,
        second_bias,
        second_out,
        eps,
        R: tl.constexpr,
        D: tl.constexpr,
        OUT: tl.constexpr,
        KIND: tl.constexpr,  # of the activation; None: there is none
        GATED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        SECOND_OUT: tl.constexpr,
        SECOND_KIND: tl.constexpr,
        SECOND_GATED: tl.constexpr,
        SECOND_HAS_BIAS: tl.constexpr,
        CENTRED: tl.constexpr,  # LayerNorm
        BLOCK_OUT: tl.constexpr,
        BLOCK: tl.constexpr,  # ≥ d
        EARLY: tl.constexpr,
    ):
        program = tl.program_id(0)
        first: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
        if SECOND_OUT == 0 or program < first:
            _one_product(
                program, x, norm, norm_bias, weight, bias, out, eps, R, D, OUT, KIND, GATED,
                HAS_BIAS, CENTRED, BLOCK_OUT, BLOCK, EARLY,
            )  # fmt: skip
        else:
            _one_product(
                program - first, x, second_norm, second_norm_bias, second_weight, second_bias,
                second_out, eps, R, D, SECOND_OUT, SECOND_KIND, SECOND_GATED, SECOND_HAS_BIAS,
                CENTRED, BLOCK_OUT, BLOCK, EARLY,
            )  # fmt: skip


def outputs_a_program(outputs: int, size: int) -> int:
    """Return how many outputs a program makes, of a launch's `outputs`, each of `size` bytes."""
    most = max(1, min(_MOST_OUTPUTS, _TILE // size, outputs // _PROGRAMS))
    return 1 << (most.bit_length() - 1)


def warps_of(elements: int) -> int:
    """Return the warps that hold a tile of so many weights, 64 of them a thread."""
    return min(16, max(1, triton.next_power_of_2(elements) // 2048))


def require_like(x: Tensor, *tensors: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError for a tensor, given with its name, that has not this shape and x's dtype."""
    for name, tensor, shape in tensors:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"{name}: must be {shape} of {x.dtype} like x {tuple(x.shape)}, saw "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )


def normed_products(
    x: Tensor,  # (R, d)
    products: Sequence[NormedProduct],  # one, or two with norms of one kind
    eps: float,
) -> list[Tensor]:  # (R, O) each
    """Return each product of the rows, by one Triton launch for all of them.

    Every row reads the weights from registers, so R is to be small. Arithmetic is fp32, rounded
    once, to the dtype of x. No gradient.

    Raises ValueError for a shape or dtype that does not fit, or where Triton does not run.
    """
    require("triton", x)
    first, second = products[0], products[-1]
    for product in products:
        _check(x, product, centred=first.norm[1] is not None)
    rows, size = x.shape
    outs = [x.new_empty(rows, product.outputs) for product in products]
    if rows == 0:
        return outs
    x = x.contiguous()
    block = triton.next_power_of_2(size)
    deep = block * x.element_size() * (1 + any(product.gated for product in products))
    block_out = outputs_a_program(sum(product.outputs for product in products), deep)
    programs = sum(-(-product.outputs // block_out) for product in products)

    def tensors(product: NormedProduct, out: Tensor) -> tuple[Tensor, ...]:
        norm, norm_bias = product.norm
        given = (norm, norm_bias, product.weight, product.bias)
        return *(norm if one is None else one.contiguous() for one in given), out

    def kind(product: NormedProduct) -> str | None:
        return None if product.activation is None else ACTIVATIONS[product.activation]

    with torch.cuda.device_of(x):
        _normed_product_kernel[(programs,)](
            x, *tensors(first, outs[0]), *tensors(second, outs[-1]), eps, R=rows, D=size,
            OUT=first.outputs, KIND=kind(first), GATED=first.gated,
            HAS_BIAS=first.bias is not None,
            SECOND_OUT=second.outputs if len(products) == 2 else 0, SECOND_KIND=kind(second),
            SECOND_GATED=second.gated, SECOND_HAS_BIAS=second.bias is not None,
            CENTRED=first.norm[1] is not None, BLOCK_OUT=block_out, BLOCK=block,
            num_warps=warps_of(block_out * deep // x.element_size()), enable_fp_fusion=True,
            **early(x),
        )  # fmt: skip
    return outs


def _check(x: Tensor, product: NormedProduct, centred: bool) -> None:
    size, rows = x.shape[-1], len(product.weight)
    if (product.norm[1] is not None) != centred:
        raise ValueError("products: all norms must be LayerNorms, or all RMSNorms")
    if product.gated and (rows % 2 or product.activation is None):
        raise ValueError(f"weight: a gated one has two halves and an activation, saw {rows} rows")
    require_like(
        x, ("norm", product.norm[0], (size,)), ("norm's bias", product.norm[1], (size,)),
        ("weight", product.weight, (rows, size)), ("bias", product.bias, (rows,)),
    )  # fmt: skip


def normed_products_ref(
    x: Tensor, products: Sequence[NormedProduct], eps: float, passes: str = "torch"
) -> list[Tensor]:
    """Compute the same by torch's products; `passes`: the backend of norms and activations."""
    norms = [product.norm for product in products]
    if len(norms) == 2:
        _, *normed = two_residual_norms(x, None, norms[0], norms[1], eps, passes)
    else:
        _, *normed = residual_norm(x, None, *norms[0], eps, passes)
    outs = []
    for product, h in zip(products, normed, strict=True):
        out = F.linear(h, product.weight, product.bias)
        if product.activation is not None:
            out = activation(out, None, product.activation, product.gated, passes)
        outs.append(out)
    return outs
