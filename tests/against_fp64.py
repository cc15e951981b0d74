"""What the tests of the block's ops share: errors against fp64, compared with those of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_gradients(
    run: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Outputs of `run(*inputs)`, then the gradients of a fixed mixture of them to each input."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in inputs]
    # A node in front, as in a model: ops that write in place may not touch a leaf.
    out = run(*(leaf * 1 for leaf in leaves))
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    probes = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, dtype)
        for o in outs
    ]
    grads = torch.autograd.grad(outs, leaves, probes)
    return [t.detach().cpu() for t in (*outs, *grads)]


def assert_as_close_as_torch(
    found: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """Errors at most three times those of plain torch in the same dtype, or of one rounding."""
    for index, (f, t, x) in enumerate(zip(found, torchs, exact, strict=True)):
        assert f.shape == x.shape and f.dtype == t.dtype
        if not x.numel():
            continue
        size = x.abs().amax().item()
        floor = torch.finfo(f.dtype).eps * size
        error, allowed = ((y.double() - x).abs().amax().item() for y in (f, t))
        assert error <= 3 * allowed + floor, (index, error, allowed, floor)
