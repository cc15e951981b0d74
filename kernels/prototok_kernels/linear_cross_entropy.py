"""Loss, prediction, margin and gradient of a frozen language-model head, without keeping logits.

Letters: R rows (one row = one position of one text), d hidden size, V vocabulary, C rows a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok_kernels.backend import _cpu, multiprocessors, require
from prototok_kernels.packed import packed, why_unpacked
from prototok_kernels.views import views

# What logits may take on CUDA, where products want many rows at a time.
_CUDA_BYTES = 1 << 30
# Enough rows for full speed in the two products: smaller chunks, which would stay in the cache,
# read the weight more often and lose more than that saves (docs/dev/log.md).
_CPU_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class HeadOutput:
    """What the head says about each row.

    loss        (R,) fp32   cross-entropy of the target, nats, at the given temperature
    predicted   (R,) int64  argmax of the logits, the lowest id among equals
    margin      (R,) fp32   target logit minus the best other logit; positive when the target wins
    grad_hidden (R, d)      gradient of Σ token_weight · loss, in hidden's dtype; None if not wanted
    """

    loss: Tensor
    predicted: Tensor
    margin: Tensor
    grad_hidden: Tensor | None


def _cpu_pass(
    logits: Tensor,  # (C, V)
    gradient: Tensor | None,  # (C, V), may be logits; None = not wanted
    targets: Tensor,  # (C,)
    token_weight: Tensor | None,  # (C,)
    temperature: float,
    loss: Tensor,  # (C,), written, as are the next two
    predicted: Tensor,  # (C,)
    margin: Tensor,  # (C,)
) -> None:
    try:
        _cpu.head(
            **views(
                logits=logits,
                gradient=gradient,
                targets=targets,
                token_weight=token_weight,
                loss=loss,
                predicted=predicted,
                margin=margin,
            ),
            temperature=temperature,
            threads=torch.get_num_threads(),
        )
    except IndexError as error:
        raise ValueError(str(error)) from None


def packed_head(weight: Tensor) -> Any:
    """Return the C++ head of a weight (V, d) that `why_unpacked` says nothing against."""
    return packed(weight, [weight], lambda: _cpu.PackedHead(**views(weight=weight.detach())))


def _linear_cross_entropy_packed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    temperature: float,
    need_grad: bool,
    workspace_bytes: int,
) -> HeadOutput:
    """Run product, pass and product, a tile of rows and a chunk of the vocabulary at a time."""
    hidden, targets = hidden.contiguous(), targets.contiguous()
    if token_weight is not None:
        token_weight = token_weight.to(torch.float32).contiguous()
    out = _empty_output(hidden, targets, need_grad)
    threads = torch.get_num_threads()
    head = packed_head(weight)
    tile = max(1, workspace_bytes // (threads * head.workspace_bytes(tile=1)))
    try:
        head.run(
            **views(
                hidden=hidden,
                grad_hidden=out.grad_hidden,
                targets=targets,
                token_weight=token_weight,
                loss=out.loss,
                predicted=out.predicted,
                margin=out.margin,
            ),
            temperature=temperature,
            tile=tile,
            threads=threads,
        )
    except IndexError as error:
        raise ValueError(str(error)) from None
    return out


def _linear_cross_entropy_fused(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    temperature: float,
    need_grad: bool,
    workspace_bytes: int,
    backend: str,
) -> HeadOutput:
    """Run GEMM, one pass over the chunk in place, GEMM; the logits stay in hidden's dtype."""
    row_pass = _cpu_pass
    if backend == "triton":
        from prototok_kernels.head_triton import triton_pass as row_pass
    hidden, targets = hidden.contiguous(), targets.contiguous()
    if token_weight is not None:
        token_weight = token_weight.to(torch.float32).contiguous()
    out = _empty_output(hidden, targets, need_grad)
    if weight is None:  # no workspace: the pass reads hidden and writes the gradient
        row_pass(
            hidden, out.grad_hidden, targets, token_weight, temperature,
            out.loss, out.predicted, out.margin,
        )  # fmt: skip
        return out
    rows, (vocabulary, size) = targets.shape[0], weight.shape
    largest = max(1, workspace_bytes // (vocabulary * hidden.element_size()))
    if backend == "triton":
        from prototok_kernels.head_triton import whole_waves

        chunk = whole_waves(rows, size, largest, multiprocessors(hidden.device))
    else:
        # Equal chunks: a short last one would read the whole weight twice for a few rows.
        chunk = math.ceil(rows / max(1, math.ceil(rows / largest)))
    workspace = hidden.new_empty(chunk, vocabulary)
    for start in range(0, rows, max(1, chunk)):
        part = slice(start, min(start + chunk, rows))
        logits = workspace[: part.stop - start]  # (C, V)
        torch.mm(hidden[part], weight.T, out=logits)
        row_pass(
            logits,
            logits if need_grad else None,
            targets[part],
            None if token_weight is None else token_weight[part],
            temperature,
            out.loss[part],
            out.predicted[part],
            out.margin[part],
        )
        if out.grad_hidden is not None:
            torch.mm(logits, weight, out=out.grad_hidden[part])
    return out


def _linear_cross_entropy_torch(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    temperature: float,
    need_grad: bool,
    workspace_bytes: int,
) -> HeadOutput:
    """Compute the same in plain torch; logits are fp32 from the product on."""
    rows = targets.shape[0]
    vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
    out = _empty_output(hidden, targets, need_grad)
    chunk = max(1, workspace_bytes // (4 * vocabulary))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        h, t = hidden[part], targets[part]
        logits = (h if weight is None else h @ weight.T).float()  # (C, V)
        if weight is None and logits is h:
            logits = logits.clone()
        target_logit = logits.gather(1, t[:, None])
        out.predicted[part] = logits.argmax(dim=-1)
        logits.scatter_(1, t[:, None], float("-inf"))
        out.margin[part] = target_logit[:, 0] - logits.amax(dim=-1)
        logits.scatter_(1, t[:, None], target_logit)
        if temperature != 1.0:
            logits.div_(temperature)
            target_logit = target_logit / temperature
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        out.loss[part] = (normaliser - target_logit)[:, 0]
        if out.grad_hidden is None:
            continue
        logits.sub_(normaliser).exp_()
        logits.scatter_add_(1, t[:, None], torch.full_like(target_logit, -1.0))
        scale = 1.0 if token_weight is None else token_weight[part, None]
        logits.mul_(scale / temperature)
        grad = logits.to(hidden.dtype)
        out.grad_hidden[part] = grad if weight is None else grad @ weight
    return out


def _empty_output(hidden: Tensor, targets: Tensor, need_grad: bool) -> HeadOutput:
    rows = targets.shape[0]
    return HeadOutput(
        hidden.new_empty(rows, dtype=torch.float32),
        targets.new_empty(rows),
        hidden.new_empty(rows, dtype=torch.float32),
        torch.empty_like(hidden) if need_grad else None,
    )


@torch.no_grad()
def linear_cross_entropy(
    hidden: Tensor,  # (R, d)
    weight: Tensor | None,  # (V, d), frozen; None when hidden already holds logits, (R, V)
    targets: Tensor,  # (R,) int64 in [0, V)
    token_weight: Tensor | None = None,  # (R,) fp32; None = ones; 0 = not trained on
    *,
    temperature: float = 1.0,
    need_grad: bool = True,
    workspace_bytes: int | None = None,
    backend: str,
) -> HeadOutput:
    """Compute the cross-entropy of `softmax(hidden @ weight.T / temperature)` and what fits need.

    At most `workspace_bytes` of logits are alive at once (of fp32 logits for "torch", which also
    makes temporaries; None is 1 GiB for "triton", of which it takes what fills the GPU's
    processors, 64 MiB for "cpu", and 256 MiB else): rows are taken in chunks, each chunk's logits
    become its gradient in place, and one more product turns that into the gradient of the hidden
    state. There is no gradient of the weight, no synchronisation with the host on a GPU, and every
    row is summed in a fixed order.

    `backend` is "torch", "triton" (CUDA; fp32, bf16, fp16), "cpu" (C++; fp32, bf16) or "packed". In
    the last three the logits have hidden's dtype, and all arithmetic on them is fp32. "packed" is
    C++ throughout, for bf16 on a processor with AMX, AVX-512 BF16 or AVX2: it lays the weight out
    for its products when it first sees it and keeps that, twice the weight's size with gradients,
    as long as the weight lives.

    Raises ValueError for a shape, dtype, temperature or backend that cannot be met, and on the CPU
    for a target outside [0, V); on a GPU such a row's loss is NaN.
    """
    _check(hidden, weight, targets, token_weight, temperature)
    require("cpu" if backend == "packed" else backend, hidden)
    if workspace_bytes is None:
        workspace_bytes = {"triton": _CUDA_BYTES, "cpu": _CPU_CHUNK_BYTES}.get(backend, 256 << 20)
    if backend == "torch":
        return _linear_cross_entropy_torch(
            hidden, weight, targets, token_weight, temperature, need_grad, workspace_bytes
        )
    if backend == "packed":
        why = "hidden holds logits" if weight is None else why_unpacked([weight])
        if weight is None or why is not None:
            raise ValueError(f"weight: backend 'packed' cannot take it, {why}")
        return _linear_cross_entropy_packed(
            hidden, weight, targets, token_weight, temperature, need_grad, workspace_bytes
        )
    return _linear_cross_entropy_fused(
        hidden, weight, targets, token_weight, temperature, need_grad, workspace_bytes, backend
    )


def _check(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    temperature: float,
) -> None:
    rows = targets.shape[0] if targets.ndim == 1 else -1
    if hidden.ndim != 2 or hidden.shape[0] != rows:
        raise ValueError(
            f"hidden: must be (R, d) for targets (R,), saw {tuple(hidden.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: must be int64, saw {targets.dtype}")
    if weight is not None and (weight.ndim != 2 or weight.shape[1] != hidden.shape[1]):
        raise ValueError(
            f"weight: must be (V, {hidden.shape[1]}) for this hidden, saw {tuple(weight.shape)}"
        )
    if weight is not None and weight.dtype != hidden.dtype:
        raise ValueError(f"weight: must have hidden's dtype {hidden.dtype}, saw {weight.dtype}")
    if token_weight is not None and token_weight.shape != targets.shape:
        raise ValueError(f"token_weight: must be ({rows},), saw {tuple(token_weight.shape)}")
    if not temperature > 0.0:
        raise ValueError(f"temperature: must be positive, saw {temperature}")
    for name, other in (("weight", weight), ("targets", targets), ("token_weight", token_weight)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name}: is on {other.device}, hidden is on {hidden.device}")


def linear_cross_entropy_ref(
    hidden: Tensor,  # (R, d)
    weight: Tensor | None,  # (V, d)
    targets: Tensor,  # (R,) int64
    token_weight: Tensor,  # (R,) fp32
    temperature: float = 1.0,
) -> HeadOutput:
    """Compute the same by autograd over all logits at once: the definition."""
    hidden = hidden.detach().requires_grad_()
    logits = hidden if weight is None else hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits / temperature, targets, reduction="none")
    (grad,) = torch.autograd.grad((loss * token_weight).sum(), hidden)
    logits = logits.detach()
    target_logit = logits.gather(1, targets[:, None])[:, 0]
    best_other = logits.scatter(1, targets[:, None], float("-inf")).amax(dim=-1)
    return HeadOutput(loss.detach(), logits.argmax(dim=-1), target_logit - best_other, grad)
