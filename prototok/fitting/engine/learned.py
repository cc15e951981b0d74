"""Updates by a learned optimiser, and its end: AdamW goes on from the best vectors.

Like all of a step this reads nothing back to the host and rebinds no buffer. Letters: R rows,
G groups, n vectors of one kind, d hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok.fitting.engine.slots import Bank, Slots, Window
from prototok.fitting.learned.network import Seen, token_rows
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.adamw_rows import AdamWState, adamw_rows_

_MOST = 20  # times its patience is what a network gets at most


def hand_over(slots: Slots, window: Window, improved: Tensor, bad: Tensor) -> Tensor:
    """Take groups from the network whose progress stopped: (G,) bool, those taken now.

    They go on from their best vectors with AdamW as new, which has all updates that the recipe
    grants before it. Progress is what makes vectors the best so far: more right tokens, or as many
    with a larger margin. `bad` (G,) flags a loss or gradient that is not finite.

    A network leads further out than AdamW does, and an update changes less there. So AdamW's are
    longer, by as many times as vectors lie further from where fits start than good vectors do.
    """
    groups = slice(window.groups)
    step, progressed_at = slots.step[groups], slots.progressed_at[groups]
    torch.where(improved, step, progressed_at, out=progressed_at)
    patience = slots.recipe.learned
    stalled = (step - progressed_at >= patience) | (step >= _MOST * patience)
    taken = slots.by_network[groups] & ~slots.done[groups] & (stalled | bad)
    assert slots.network is not None
    for bank, mean in zip(slots.banks, slots.network.mean, strict=True):
        mine = taken if bank.shared else taken[slots.group_of_row[: window.rows]]
        n, wide = len(mine), mine[:, None, None]
        torch.where(wide, bank.best[:n], bank.values[:n], out=bank.values[:n])
        spreads = (bank.best[:n, 0] - mean).square().mean(1).sqrt() / slots.network.scale
        longer = bank.longer[:n]
        torch.where(mine, (spreads - 1).clamp_min(0.0), longer, out=longer)
        for state in (bank.adam.exp_avg, bank.adam.exp_avg_sq):
            state[:n].masked_fill_(mine[:, None], 0.0)
        bank.adam.step[:n].masked_fill_(mine, 0)
    adam_from = slots.adam_from[groups]
    torch.where(taken, step, adam_from, out=adam_from)
    if slots.recipe.cold is not None:  # what is right already has nothing to find, but a margin
        until = slots.cold_until[groups]
        torch.where(taken & slots.right_at_best(window), step, until, out=until)
    slots.by_network[groups] &= ~taken
    return taken


def update(lm: FrozenLM, slots: Slots, window: Window, active: Tensor, backend: str) -> None:
    """Update active groups by the network, or by AdamW where it has taken over.

    AdamW's moments are kept for both: the network reads the step that they give.
    """
    step, owner = slots.step[: window.groups], slots.group_of_row[: window.rows]
    by_network, recipe = slots.by_network[: window.groups], slots.recipe
    rate = slots.rate_after(slots.clock[: window.groups])
    rates = [rate, rate * recipe.m_rate]  # of e and of m, by group
    where = [slice(None) if bank.shared else owner for bank in slots.banks]  # a vector's group
    moves = []
    for bank, rate, of in zip(slots.banks, rates, where, strict=True):
        of_vector = torch.where(by_network, 1.0, rate)[of]
        of_vector = of_vector * (1 + bank.longer[: len(of_vector)])
        moves.append(adam_move(bank, of_vector, active[of], slots, backend))
    made = moves
    # On CUDA nobody asks: the host would wait, and a graph has no branches.
    if slots.device.type != "cpu" or bool(by_network.any()):
        assert slots.network is not None
        e, m = slots.network(seen_of(lm, slots, window, moves)).unbind(1)
        taken = slots.scored[: window.rows].any(1)
        made = [
            _mean_by_group(of_row, taken, owner, len(step)) if bank.shared else of_row
            for bank, of_row in zip(slots.banks, (e, recipe.m_rate * m), strict=True)
        ]
    for bank, rate, of, by_adam, learned in zip(
        slots.banks, rates, where, moves, made, strict=True
    ):
        mine, moving = by_network[of], active[of]
        move = torch.where((mine & moving)[:, None], learned, by_adam)
        decay = 1 - rate[of] * recipe.weight_decay * (moving & ~mine)
        values = bank.values[: len(move)]
        values.mul_(decay[:, None, None]).add_(bank.turned_back(move)[:, None])
    step += active


def adam_move(
    bank: Bank, rate: Tensor, moving: Tensor, slots: Slots, backend: str
) -> Tensor:  # (n, d)
    """Return AdamW's step in the eigenbasis, without its decay, and keep its moments."""
    n = len(rate)
    moved = torch.zeros_like(bank.values[:n, 0])
    state = AdamWState(bank.adam.exp_avg[:n], bank.adam.exp_avg_sq[:n], bank.adam.step[:n])
    adamw_rows_(
        moved, bank.turned(bank.grad[:n, 0]), state, rate, moving,
        replace(slots.recipe.adamw, weight_decay=0.0), backend=backend,
    )  # fmt: skip
    return moved


def seen_of(lm: FrozenLM, slots: Slots, window: Window, moves: list[Tensor]) -> Seen:
    """Return what the network sees of each row; a shared vector counts with each row of its group.

    `moves` are what `adam_move` gave at rate 1.
    """
    rows, owner = slice(window.rows), slots.group_of_row[: window.rows]

    def by_row(parts: list[Tensor]) -> Tensor:
        return torch.stack(
            [
                part[owner] if bank.shared else part[rows]
                for part, bank in zip(parts, slots.banks, strict=True)
            ],
            dim=1,
        )

    length = slots.scored[rows].sum(1).clamp_min(1)  # one: of a free place
    assert slots.network is not None
    tokens, errors, margins = _positions(lm, slots, window, slots.network.reach)
    return Seen(
        vectors=by_row([bank.values[:, 0] for bank in slots.banks]),
        grad=by_row([bank.turned(bank.grad[:, 0]) for bank in slots.banks]),
        direction=by_row(moves),
        step=slots.step[owner],
        length=length,
        loss=slots.loss[rows] / length,
        right=slots.correct[rows] / length,
        margin=slots.margin[rows],
        tokens=tokens,
        errors=errors,
        margins=margins,
    )


def _positions(
    lm: FrozenLM, slots: Slots, window: Window, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (R, P, d), errors (R, P, d) and margins (R, P) of the first P positions."""
    rows, here = slice(window.rows), min(reach, window.length)
    scored = slots.scored[rows, :here]
    tokens = token_rows(lm)[slots.targets[rows, :here]] * scored[:, :, None]
    margins = torch.where(scored, slots.margins[rows, :here], 0.0)
    beyond = (0, 0, 0, reach - here)
    return (
        F.pad(tokens, beyond), F.pad(slots.errors[rows, :here], beyond), F.pad(margins, beyond[2:]),
    )  # fmt: skip


def _mean_by_group(of_row: Tensor, taken: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Average (R, d) over the rows of each group that are `taken`: (G, d)."""
    total = of_row.new_zeros(groups, of_row.shape[1])
    total.index_add_(0, owner, torch.where(taken[:, None], of_row, 0.0))
    count = of_row.new_zeros(groups).index_add_(0, owner, taken.to(of_row.dtype))
    return total / count.clamp_min(1)[:, None]
