"""One step for all rows in flight: forward, head, backward, score, keep the best, update.

It reads and writes the buffers of `Slots` and nothing else, rebinds none of them and reads nothing
back to the host, so that it can be captured as a CUDA graph. Letters: R rows, G groups, N targets,
L input positions, d hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prototok.common.ranges import named_range
from prototok.fitting.engine import learned
from prototok.fitting.engine.slots import Slots, Window
from prototok.model.families import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.adamw_rows import AdamWState, adamw_rows_
from prototok_kernels.groups import of_group
from prototok_kernels.linear_cross_entropy import linear_cross_entropy
from prototok_kernels.plan import Plan


def step(lm: FrozenLM, slots: Slots, rows_per_forward: int) -> None:
    """Score the current vectors, keep them where they are the best so far, then update them.

    Rows beyond `rows_per_forward` take turns; their gradients add up before the one update. What a
    later step reads is not written before all forwards and backwards are through, so a step that
    runs out of memory can be run again with fewer rows at a time.
    """
    window = slots.window
    backend = lm.plan(window.rows, window.length, slots.backend).update.taken
    counts = [window.groups if bank.shared else window.rows for bank in slots.banks]
    leaves = [
        bank.values[:n].detach().requires_grad_()
        for bank, n in zip(slots.banks, counts, strict=True)
    ]
    grads = [bank.grad[:n].zero_() for bank, n in zip(slots.banks, counts, strict=True)]
    for start in range(0, window.rows, rows_per_forward):
        part = slice(start, min(start + rows_per_forward, window.rows))
        part_grads = forward_backward(lm, slots, leaves, part)
        for total, grad in zip(grads, part_grads, strict=True):
            total += grad
    with named_range("update", lm.device):
        active = _keep_best(slots, window, grads)
        if slots.network is None:
            _update(slots, window, counts, active, backend)
        else:
            learned.update(lm, slots, window, active, backend)
        if slots.recipe.cold is not None:
            slots.follow(window)


def forward_backward(
    lm: FrozenLM, slots: Slots, leaves: list[Tensor], part: slice
) -> tuple[Tensor, ...]:
    """Score some rows, and return the gradient of the sum of their losses."""
    length, offset = slots.window.length, slots.inputs.offset
    targets, scored = slots.targets[part, :length], slots.scored[part, :length]
    positions = slots.inputs.input_length(length)
    plan = lm.plan(len(targets), positions, slots.backend, slots.inputs.is_pair)
    with named_range("forward", lm.device):
        hidden = _hidden(lm, slots, leaves, part, plan)[:, offset : offset + length].flatten(0, 1)
    with named_range("head", lm.device):
        head = linear_cross_entropy(
            hidden.detach(), lm.body.head, targets.flatten(), scored.flatten().float(),
            temperature=slots.recipe.temperature, backend=plan.head.taken,
        )  # fmt: skip
    with named_range("backward", lm.device):
        grads = torch.autograd.grad(hidden, leaves, head.grad_hidden)
    right = (head.predicted.view_as(targets) == targets) & scored
    margin = head.margin.view(targets.shape).masked_fill(~scored, float("inf"))
    loss = head.loss.view(targets.shape).masked_fill(~scored, 0.0)
    slots.loss[part] = loss.sum(1)
    slots.correct[part] = right.sum(1)
    slots.margin[part] = margin.amin(1)
    if reach := min(slots.errors.shape[1], length):
        assert head.grad_hidden is not None
        errors = head.grad_hidden.view(*targets.shape, -1)  # zero where nothing is scored
        slots.errors[part, :reach] = errors[:, :reach]
        slots.margins[part, :reach] = head.margin.view(targets.shape)[:, :reach]
    return grads


def _hidden(lm: FrozenLM, slots: Slots, leaves: list[Tensor], part: slice, plan: Plan) -> Tensor:
    """Compute the hidden states (R, L, d) of some rows from the vectors they use."""
    body, length = lm.body, slots.window.length
    owner = slots.group_of_row[part]
    if plan.first_layer.taken != "in full":
        assert isinstance(body, DecoderBody)
        (e, m), (e_bank, m_bank) = leaves, slots.banks
        e, m = e[:, 0], m[:, 0]
        e = of_group(e, owner) if e_bank.shared else e[part]
        if m_bank.shared:  # what depends on m alone is made once a group
            return body.hidden_of_pair(e, m, owner, plan.length, plan)
        return body.hidden_of_pair(e, m[part], None, plan.length, plan)
    vectors = [
        of_group(leaf, owner) if bank.shared else leaf[part]
        for leaf, bank in zip(leaves, slots.banks, strict=True)
    ]
    layout = slots.layout_of(part, length)
    return body.hidden(slots.inputs.embeds(torch.cat(vectors, dim=1), layout), plan)


def _keep_best(slots: Slots, window: Window, grads: list[Tensor]) -> Tensor:
    """Snapshot groups that scored better than ever, flag those that end; (G,) still active."""
    rows, groups = slice(window.rows), slice(window.groups)
    owner, correct_of_row = slots.group_of_row[rows], slots.correct[rows]
    step, done = slots.step[groups], slots.done[groups]
    best_correct, best_margin = slots.best_correct[groups], slots.best_margin[groups]
    slots.scored_at[rows] = step[owner]

    correct = torch.zeros_like(best_correct).index_add_(0, owner, correct_of_row)
    margin = torch.full_like(best_margin, float("inf"))
    margin.scatter_reduce_(0, owner, slots.margin[rows], "amin")
    reached = torch.ones_like(step)
    reached.scatter_reduce_(0, owner, (correct_of_row >= slots.wanted[rows]).long(), "amin")

    failed = slots.failed[groups]
    bad = ~done & ~_finite(slots, owner, grads)
    if slots.network is None:
        failed |= bad
        moving = ~done & ~failed
    else:  # what the network spoiled goes on with AdamW, from the best vectors
        failed |= bad & ~slots.by_network[groups]
        moving = ~done & ~failed & ~bad
    moving &= slots.clock[groups] <= slots.recipe.max_steps
    more = correct > best_correct
    improved = (more | ((correct == best_correct) & (margin > best_margin))) & moving
    _put(slots.improved_at[groups], improved & more, step)
    _put(best_correct, improved, correct)
    _put(best_margin, improved, margin)
    _put(slots.row_correct[rows], improved[owner], correct_of_row)
    if slots.recipe.cold is not None:
        ends = slots.recipe.restarts(slots.clock[groups], slots.tokens[groups])
        slots.cool(groups, moving & ends & slots.right_at_best(window))
    for bank in slots.banks:
        of_vector = improved if bank.shared else improved[owner]
        n = len(of_vector)
        _put(bank.best[:n], of_vector[:, None, None], bank.values[:n])
    goal = moving & (reached > 0)
    if slots.recipe.accuracy == 1.0:
        goal &= margin >= slots.margin_bound[groups]
    done |= goal
    active = ~done & ~failed & ~slots.spent()[groups]
    if slots.network is not None:
        active &= ~learned.hand_over(slots, window, improved, bad)
    return active


def _finite(slots: Slots, owner: Tensor, grads: list[Tensor]) -> Tensor:
    """Flag groups whose rows all have finite losses and gradients: (G,) bool."""
    good = torch.ones_like(slots.done[: slots.window.groups])
    loss = slots.loss[: len(owner)].isfinite()
    for bank, grad in zip(slots.banks, grads, strict=True):
        of_vector = grad.flatten(1).isfinite().all(1)
        if bank.shared:
            good &= of_vector
        else:
            loss = loss & of_vector
    bad = torch.zeros_like(slots.step[: len(good)]).index_add_(0, owner, (~loss).long())
    return good & (bad == 0)


def _update(slots: Slots, window: Window, counts: list[int], active: Tensor, backend: str) -> None:
    """Update the vectors of active groups by AdamW, each group at a step of its own."""
    step, owner = slots.step[: window.groups], slots.group_of_row[: window.rows]
    rate_of_e = slots.rate_after(step)
    for name, bank, n in zip("em", slots.banks, counts, strict=False):
        rate = rate_of_e if name == "e" else rate_of_e * slots.recipe.m_rate
        adam = AdamWState(bank.adam.exp_avg[:n], bank.adam.exp_avg_sq[:n], bank.adam.step[:n])
        of_vector = slice(None) if bank.shared else owner
        values, grad = bank.values[:n], bank.grad[:n]
        settings, rates, moving = slots.recipe.adamw, rate[of_vector], active[of_vector]
        if bank.basis is None:
            adamw_rows_(
                values.flatten(1), grad.flatten(1), adam, rates, moving, settings,
                backend=backend,
            )  # fmt: skip
            continue
        # The decay is the same in any coordinates; so only the step is made in those of the basis,
        # from zero, and turned back.
        moved = torch.zeros_like(values)
        adamw_rows_(
            moved.flatten(1), (grad @ bank.basis).flatten(1), adam, rates, moving,
            replace(settings, weight_decay=0.0), backend=backend,
        )  # fmt: skip
        decay = 1 - rates * settings.weight_decay * moving
        values.mul_(decay[:, None, None]).add_(moved @ bank.basis.T)
    step += active


def _put(into: Tensor, where: Tensor, values: Tensor) -> None:
    """Set `into[where] = values[where]`, in place and without counting what is true."""
    torch.where(where, values, into, out=into)
