"""A prefix that is learned: vectors in front of e, the same for all texts of a model.

It is prompt tuning (Lester et al., arXiv 2104.08691) with e of each text as the only input: P
virtual tokens that make a frozen model decode vectors in one forward pass.

Letters: T texts, N targets of the longest, P vectors of the prefix, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.common.memory import held
from prototok.common.progress import Progress
from prototok.fitting.engine.rows import initial_vectors, make_groups
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM
from prototok.model.prefix import Prefix
from prototok_kernels.adamw_rows import AdamWState, adamw_rows_
from prototok_kernels.linear_cross_entropy import linear_cross_entropy

_ROWS = 32  # texts of a forward, where nobody says how many; their gradients add up


@dataclass(frozen=True, eq=False)
class Joint:
    """Vectors that were fitted together to all texts; fp32 on the CPU.

    prefix    the P vectors in front, or what stood there; None: nothing
    e         (T, d), one a text; m: (d,), one for all of them
    accuracy  share of the tokens that came back
    """

    prefix: Prefix | None
    e: Tensor
    m: Tensor
    accuracy: float


def learn_prefix(
    lm: FrozenLM,
    targets: list[Tensor],
    count: int,
    recipe: Recipe,
    backend: str,
    batch_size: int | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> Joint:
    """Fit [p_1 … p_P, e, m, …, m] to all texts at once: one p and one m, an e for each text.

    p starts as the first `count` tokens of the texts, one after the other; e and m start as
    `recipe` says, from the noise of `seed`.

    Raises ValueError where the model's context has no room for P + N positions, and where a number
    did not stay finite.
    """
    lm = lm.bare
    ids, scored = _padded(targets)
    ids, scored = ids.to(lm.device), scored.to(lm.device)
    if lm.context is not None and count + ids.shape[1] > lm.context:
        raise ValueError(
            f"prefix: {count} vectors and {ids.shape[1]} tokens need {count + ids.shape[1]} "
            f"positions, {lm.identity.name} has {lm.context}"
        )
    (group,) = make_groups(targets, [seed], "m", None)
    e, m = initial_vectors(group, 1, lm.hidden_size, recipe.init_std)
    first = torch.cat(targets)[torch.arange(count, device="cpu") % sum(map(len, targets))]
    prefix = lm.cast(torch.float32).embed(first)[None]  # (1, P, d)
    vectors = [v.to(lm.device).contiguous() for v in (prefix, e, m[:, None])]
    states = [AdamWState.zeros(v.flatten(1)) for v in vectors]
    update = lm.plan(len(targets), ids.shape[1], backend).update.taken
    what = f"prefix of {count} vectors"
    with Progress(recipe.max_steps, what, progress, steady=True) as bar:
        for step in range(recipe.max_steps + 1):
            grads, right = _gradients(
                lm, vectors, ids, scored, recipe.temperature, backend, batch_size or _ROWS
            )
            bar.update(step, f"accuracy {right:.2f}, {held(lm.device) / 1e9:.1f} GB")
            if step == recipe.max_steps:  # these vectors are scored, and kept
                break
            rate = recipe.lr_at(torch.tensor([step], dtype=torch.int64, device=lm.device))
            for v, grad, state in zip(vectors, grads, states, strict=True):
                moving = torch.ones(len(v), dtype=torch.bool, device=lm.device)
                adamw_rows_(
                    v.flatten(1), grad.flatten(1), state, rate.expand(len(v)).contiguous(), moving,
                    recipe.adamw, backend=update,
                )  # fmt: skip
    found, e, m = (v.cpu() for v in vectors)
    if not found.isfinite().all():
        raise ValueError(f"prefix: fits on {lm.identity.name} did not stay finite")
    return Joint(Prefix(found[0]), e[:, 0], m[0, 0], right)


def _padded(targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ids (T, N), padded with 0, and which of them count."""
    ids = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
    lengths = torch.tensor([len(t) for t in targets], dtype=torch.int64, device="cpu")
    return ids, torch.arange(ids.shape[1], device="cpu") < lengths[:, None]


def _gradients(
    lm: FrozenLM,
    vectors: list[Tensor],  # (1, P, d), (T, 1, d) and (1, 1, d)
    ids: Tensor,  # (T, N)
    scored: Tensor,  # (T, N)
    temperature: float,
    backend: str,
    rows_at_once: int,
) -> tuple[list[Tensor], float]:
    """Return the gradients of the sum of all losses, and the share of the tokens that are right."""
    count, length = vectors[0].shape[1], ids.shape[1]
    totals, right = [torch.zeros_like(v) for v in vectors], 0.0
    for start in range(0, len(ids), rows_at_once):
        rows = slice(start, start + rows_at_once)
        here, counts = ids[rows], scored[rows]
        leaves = [
            v[rows if v is vectors[1] else slice(None)].detach().requires_grad_() for v in vectors
        ]
        p, e, m = (v.to(lm.dtype).expand(len(here), -1, -1) for v in leaves)
        x = torch.cat([p, e, m.expand(-1, length - 1, -1)], dim=1)
        plan = lm.plan(len(here), count + length, backend)
        hidden = lm.body.hidden(x, plan)[:, count:].flatten(0, 1)
        head = linear_cross_entropy(
            hidden.detach(), lm.body.head, here.flatten(), counts.flatten().float(),
            temperature=temperature, backend=plan.head.taken,
        )  # fmt: skip
        grads = torch.autograd.grad(hidden, leaves, head.grad_hidden)
        for total, grad in zip(totals, grads, strict=True):
            (total[rows] if total is totals[1] else total).add_(grad)
        right += float(((head.predicted.view_as(here) == here) & counts).sum())
    return totals, right / float(scored.sum())
