"""Loss, prediction, margin and gradient of a frozen language-model head, without keeping logits.

Letters: R rows (one row = one position of one text), d hidden size, V vocabulary, C rows a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class HeadOutput:
    """What the head says about each row.

    loss        (R,) fp32   cross-entropy of the target, nats, at the given temperature
    predicted   (R,) int64  argmax of the logits
    margin      (R,) fp32   target logit minus the best other logit; positive when predicted is right
    grad_hidden (R, d)      gradient of Σ token_weight · loss, in hidden's dtype; None if not asked for
    """

    loss: Tensor
    predicted: Tensor
    margin: Tensor
    grad_hidden: Tensor | None


def linear_cross_entropy_ref(
    hidden: Tensor,  # (R, d)
    weight: Tensor | None,  # (V, d)
    targets: Tensor,  # (R,) int64
    token_weight: Tensor,  # (R,) fp32
    temperature: float = 1.0,
) -> HeadOutput:
    """The definition, by autograd over all logits at once."""
    hidden = hidden.detach().requires_grad_()
    logits = hidden if weight is None else hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits / temperature, targets, reduction="none")
    (grad,) = torch.autograd.grad((loss * token_weight).sum(), hidden)
    top2 = logits.detach().topk(2, dim=-1)
    target_logit = logits.detach().gather(1, targets[:, None])[:, 0]
    is_top = top2.indices[:, 0] == targets
    margin = target_logit - torch.where(is_top, top2.values[:, 1], top2.values[:, 0])
    return HeadOutput(loss.detach(), top2.indices[:, 0], margin, grad)


def linear_cross_entropy(
    hidden: Tensor,  # (R, d)
    weight: Tensor | None,  # (V, d), frozen; None when hidden already holds logits, (R, V)
    targets: Tensor,  # (R,) int64 in [0, V)
    token_weight: Tensor | None = None,  # (R,) fp32; None = ones; 0 = not trained on
    *,
    temperature: float = 1.0,
    need_grad: bool = True,
    workspace_bytes: int = 256 << 20,
) -> HeadOutput:
    """Cross-entropy of `softmax(hidden @ weight.T / temperature)` and what a fit needs beside it.

    At most `workspace_bytes` of fp32 logits are alive at once: rows are taken in chunks, each
    chunk's logits become its probabilities and then its gradient in place, and one more product
    turns that into the gradient of the hidden state. There is no gradient of the weight, no
    synchronisation with the host, and every row is summed in a fixed order.
    """
    rows = targets.shape[0]
    vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
    loss = hidden.new_empty(rows, dtype=torch.float32)
    predicted = targets.new_empty(rows)
    margin = hidden.new_empty(rows, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_grad else None
    chunk = max(1, workspace_bytes // (4 * vocabulary))
    with torch.no_grad():
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            h, t = hidden[part], targets[part]
            logits = (h if weight is None else h @ weight.T).float()  # (C, V)
            if weight is None and logits is h:
                logits = logits.clone()
            target_logit = logits.gather(1, t[:, None])
            predicted[part] = logits.argmax(dim=-1)
            logits.scatter_(1, t[:, None], float("-inf"))
            margin[part] = target_logit[:, 0] - logits.amax(dim=-1)
            logits.scatter_(1, t[:, None], target_logit)
            if temperature != 1.0:
                logits.div_(temperature)
                target_logit = target_logit / temperature
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss[part] = (normaliser - target_logit)[:, 0]
            if grad_hidden is None:
                continue
            logits.sub_(normaliser).exp_()
            logits.scatter_add_(1, t[:, None], torch.full_like(target_logit, -1.0))
            scale = 1.0 if token_weight is None else token_weight[part, None]
            logits.mul_(scale / temperature)
            grad = logits.to(hidden.dtype)
            grad_hidden[part] = grad if weight is None else grad @ weight
    return HeadOutput(loss, predicted, margin, grad_hidden)
