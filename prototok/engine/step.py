"""One step for all rows in flight: forward, head, backward, score, keep the best, update.

Letters: R rows, U units, N targets, L input positions, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.engine.slots import Slots
from prototok.families import DecoderBody
from prototok.frozen_lm import FrozenLM
from prototok_kernels.adamw_rows import adamw_rows_
from prototok_kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class StepScore:
    """What the vectors that went into the step scored, row by row."""

    loss: Tensor  # (R,) fp32, nats, summed over the row's targets
    correct: Tensor  # (R,) int64
    margin: Tensor  # (R,) fp32, the smallest over the row's targets


def step(lm: FrozenLM, slots: Slots, rows_per_forward: int) -> StepScore:
    """Score the current vectors, keep them where they are the best so far, then update them.

    Rows beyond `rows_per_forward` take turns; their gradients add up before the one update. Nothing
    is written to `slots` before all forwards and backwards are through, so a step that runs out of
    memory can be run again with fewer rows at a time.
    """
    leaves = [bank.values.detach().requires_grad_() for bank in slots.banks]
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    scores = []
    for start in range(0, slots.rows, rows_per_forward):
        part = slice(start, start + rows_per_forward)
        score, part_grads = _forward_backward(lm, slots, leaves, part)
        scores.append(score)
        for total, grad in zip(grads, part_grads, strict=True):
            total += grad
    score = StepScore(
        torch.cat([s.loss for s in scores]),
        torch.cat([s.correct for s in scores]),
        torch.cat([s.margin for s in scores]),
    )
    active = _keep_best(slots, score)
    rate = slots.recipe.lr_at(slots.step)
    for bank, grad in zip(slots.banks, grads, strict=True):
        adamw_rows_(
            bank.values.flatten(1), grad.flatten(1), bank.adam, rate[bank.unit],
            active[bank.unit], slots.recipe.adamw, backend=slots.backend,
        )  # fmt: skip
    slots.step += active
    return score


def _forward_backward(
    lm: FrozenLM, slots: Slots, leaves: list[Tensor], part: slice
) -> tuple[StepScore, tuple[Tensor, ...]]:
    """Scores of some rows, and the gradient of the sum of their losses."""
    offset = slots.inputs.offset
    hidden = _hidden(lm, slots, leaves, part)[:, offset : offset + slots.length].flatten(0, 1)
    targets, scored = slots.targets[part], slots.scored[part]
    head = linear_cross_entropy(
        hidden.detach(), lm.body.head, targets.flatten(), scored.flatten().float(),
        temperature=slots.recipe.temperature, backend=slots.backend,
    )  # fmt: skip
    grads = torch.autograd.grad(hidden, leaves, head.grad_hidden)
    right = (head.predicted.view_as(targets) == targets) & scored
    margin = head.margin.view(targets.shape).masked_fill(~scored, float("inf"))
    loss = head.loss.view(targets.shape).masked_fill(~scored, 0.0)
    return StepScore(loss.sum(1), right.sum(1), margin.amin(1)), grads


def _hidden(lm: FrozenLM, slots: Slots, leaves: list[Tensor], part: slice) -> Tensor:
    """(R, L, d) hidden states of some rows, from the vectors they use."""
    body, length = lm.body, slots.inputs.input_length(slots.length)
    used = [bank.row[part] for bank in slots.banks]
    # [e, m, m, …, m] needs its first block for two vectors a row only; every other input, and
    # every model that is run by transformers, is laid out position by position.
    if slots.inputs.is_pair and isinstance(body, DecoderBody) and body.collapses(length):
        (e, m), (e_row, group) = leaves, used
        e, m, rows = e[:, 0].index_select(0, e_row), m[:, 0], len(e_row)
        if len(m) < rows:  # shared: what depends on m alone is made once a group
            return body.hidden_of_pair(e, m, group, length, slots.backend)
        return body.hidden_of_pair(e, m.index_select(0, group), None, length, slots.backend)
    vectors = torch.cat(
        [leaf.index_select(0, rows) for leaf, rows in zip(leaves, used, strict=True)], dim=1
    )
    return lm.hidden(slots.inputs.embeds(vectors, slots.layout[part]))


def _keep_best(slots: Slots, score: StepScore) -> Tensor:
    """Snapshot units that scored better than ever, flag those that are done; (U,) still active."""
    units = len(slots.units)
    owner = slots.unit_of_row
    correct = torch.zeros_like(slots.best_correct).index_add_(0, owner, score.correct)
    margin = torch.full_like(slots.best_margin, float("inf"))
    margin.scatter_reduce_(0, owner, score.margin, "amin")
    reached = torch.ones(units, dtype=torch.int64, device=owner.device)
    reached.scatter_reduce_(0, owner, (score.correct >= slots.wanted).long(), "amin")

    moving = ~slots.done & (slots.step <= slots.recipe.max_steps)
    improved = (correct > slots.best_correct) | (
        (correct == slots.best_correct) & (margin > slots.best_margin)
    )
    improved &= moving
    slots.improved_at = torch.where(
        improved & (correct > slots.best_correct), slots.step, slots.improved_at
    )
    slots.best_correct = torch.where(improved, correct, slots.best_correct)
    slots.best_margin = torch.where(improved, margin, slots.best_margin)
    slots.row_correct = torch.where(improved[owner], score.correct, slots.row_correct)
    for bank in slots.banks:
        bank.best = torch.where(improved[bank.unit][:, None, None], bank.values, bank.best)
    clears = margin >= slots.margin_bound
    if slots.recipe.accuracy < 1.0:
        clears = torch.ones_like(clears)
    slots.done |= moving & (reached > 0) & clears
    return ~slots.done & ~slots.spent()
