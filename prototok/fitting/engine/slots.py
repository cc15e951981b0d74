"""The rows in flight: vectors, optimiser state, targets, best vectors so far, in static buffers.

Groups enter and leave while others go on (continuous batching), yet no buffer ever moves: rows in
flight stand at the front, a group that leaves is closed up from behind, one that enters is written
after the last. So a step captured as a CUDA graph reads and writes the right memory for as long as
its `Window` stays the same. Letters: R rows, G groups, n vectors of one kind, K leading vectors, d
hidden size, N targets (of the longest row), L input positions; buffers have room for more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.fitting.engine.rows import Group, initial_vectors
from prototok.fitting.engine.setup import Setup
from prototok_kernels.adamw_rows import AdamWState

# Share of the newest vectors in the mean of a cold group.
_WEIGHT = 0.2


@dataclass(frozen=True)
class Room:
    """The room that the buffers have."""

    rows: int
    groups: int
    length: int  # targets of a row


@dataclass(frozen=True)
class Window:
    """The front of the buffers that a step computes; the free places inside it change nothing."""

    rows: int
    groups: int
    length: int


@dataclass(frozen=True)
class Bank:
    """All vectors of one kind, e or m, with what AdamW knows of them.

    There is one to each group where the kind is shared, else one to each row, in their order.
    """

    shared: bool
    values: Tensor  # (n, k, d) fp32; k = K for e, 1 for m
    best: Tensor  # (n, k, d) the vectors that scored best
    mean: Tensor  # (n, k, d) running mean of what a cold group passes through; of others, values
    grad: Tensor  # (n, k, d) of the last step
    adam: AdamWState  # over (n, k · d), in the coordinates of the basis
    basis: Tensor | None  # (d, d), orthonormal columns
    longer: Tensor  # (n,) by this share of them AdamW's updates are, where a network led far out

    def turned(self, vectors: Tensor) -> Tensor:
        """Return vectors (n, d) in the coordinates of the basis."""
        return vectors if self.basis is None else vectors @ self.basis

    def turned_back(self, vectors: Tensor) -> Tensor:
        """Return vectors (n, d) in the model's own coordinates."""
        return vectors if self.basis is None else vectors @ self.basis.T

    def buffers(self) -> list[Tensor]:
        """Return everything that stays with a vector as it moves."""
        adam = self.adam
        return [
            self.values, self.best, self.mean, adam.exp_avg, adam.exp_avg_sq, adam.step,
            self.longer,
        ]  # fmt: skip


class Slots:
    """The rows in flight; `admit` and `release` are the only ways in and out.

    Their writes, like those of a step, are queued on the device's current stream.
    """

    def __init__(self, setup: Setup, room: Room, share: str | None = None) -> None:
        lm, inputs = setup.lm, setup.inputs
        self.inputs, self.recipe, self.backend, self.room = (
            inputs, setup.recipe, setup.backend, room,
        )  # fmt: skip
        self.device, self.width = lm.device, lm.hidden_size
        self.network = setup.network
        self._hold([])
        rows, groups, length = room.rows, room.groups, room.length

        def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=lm.device)

        def bank(name: str, vectors: int) -> Bank:
            shape = groups if share == name else rows, vectors, self.width
            values, best, mean, grad = (full(*shape, dtype=torch.float32) for _ in range(4))
            basis = None
            if inputs.prior is not None and inputs.prior.basis is not None:
                basis = inputs.prior.basis["em".index(name)].to(lm.device)
            adam = AdamWState.zeros(values.flatten(1))
            longer = full(shape[0], dtype=torch.float32)
            return Bank(share == name, values, best, mean, grad, adam, basis, longer)

        self.banks = [bank("e", inputs.leading)] + ([bank("m", 1)] if inputs.has_m else [])
        # by group
        self.tokens = full(groups)  # targets of its longest row
        self.step = full(groups)  # updates made
        self.best_correct = full(groups, value=-1)
        self.improved_at = full(groups)  # step of the best correct
        self.best_margin = full(groups, value=float("-inf"), dtype=torch.float32)
        self.margin_bound = full(groups, dtype=torch.float32)
        self.done = full(groups, value=True, dtype=torch.bool)  # free places are
        # A loss or a gradient was not finite: the group ends, and is nothing but failed.
        self.failed = full(groups, dtype=torch.bool)
        self.cold_until = full(groups)  # updates up to which the rate is the recipe's `cold`
        # by group, where a network makes the first updates
        self.by_network = full(groups, dtype=torch.bool)
        self.progressed_at = full(groups)  # step of the best vectors
        self.adam_from = full(groups)  # updates made when AdamW took over
        # by row and position, what a network sees of them
        reach = 0 if setup.network is None else min(setup.network.reach, length)
        self.errors = full(rows, reach, self.width, dtype=lm.dtype)  # gradient at the hidden state
        self.margins = full(rows, reach, dtype=torch.float32)
        # by row
        self.group_of_row = full(rows)
        self.targets = full(rows, length)  # padded with 0
        self.scored = full(rows, length, dtype=torch.bool)
        self.wanted = full(rows)  # right targets asked for
        example = inputs.lay_out(self.targets[:1], [length], lm.dtype)
        self.layout = full(rows, *example.shape[1:], dtype=lm.dtype)
        # by row, what the vectors that went into the last step scored, and when that was
        self.scored_at = full(rows)  # updates made before
        self.loss = full(rows, dtype=torch.float32)  # nats, summed over the row's targets
        self.correct = full(rows)
        self.margin = full(rows, dtype=torch.float32)  # smallest over the row's targets
        self.row_correct = full(rows)  # of the best vectors

    def _hold(self, groups: list[Group]) -> None:
        """Note which groups are in flight, once a change: there may be thousands, at every step."""
        self.groups = groups
        # The first row of each group, and behind the last.
        self.first_rows = [0, *itertools.accumulate(len(group.rows) for group in groups)]
        self._longest = max((group.length for group in groups), default=0)

    @property
    def rows(self) -> int:
        """Count the rows in flight."""
        return self.first_rows[-1]

    @property
    def clock(self) -> Tensor:
        """Return the updates by AdamW, (room.groups,): those that the recipe's limit is for."""
        if self.network is None:
            return self.step
        return torch.where(self.by_network, 0, self.step - self.adam_from)

    @property
    def window(self) -> Window:
        """Return what the next step computes.

        On the CPU just what is in flight. On CUDA, where each window is a graph to capture, all
        that the buffers hold, halved as often as what is in flight still fits.
        """
        if self.device.type == "cpu":
            return Window(self.rows, len(self.groups), self._longest)
        return Window(
            _halved(self.room.rows, self.rows),
            _halved(self.room.groups, len(self.groups)),
            self.room.length,
        )

    def layout_of(self, part: slice, length: int) -> Tensor:
        """Return the layout of some rows for inputs of `length` targets."""
        beyond = self.room.length - length
        return self.layout[part, : self.layout.shape[1] - beyond]

    def admit(self, groups: list[Group]) -> None:
        """Put groups in behind the others, with fresh vectors and optimiser state."""
        drawn = [self._initial(group) for group in groups]
        rows = [row.targets for group in groups for row in group.rows]
        old_rows, old_groups = self.rows, len(self.groups)
        owners = [old_groups + g for g, group in enumerate(groups) for _ in group.rows]
        self._hold(self.groups + groups)
        here, there = slice(old_rows, self.rows), slice(old_groups, len(self.groups))
        for b, bank in enumerate(self.banks):
            place = there if bank.shared else here
            values = self._sent(torch.cat([vectors[b] for vectors in drawn]))
            bank.values[place] = bank.best[place] = values.view_as(bank.values[place])
            for zeroed in bank.buffers()[2:]:
                zeroed[place] = 0
        self._reset_groups(there, done=False)
        tokens = [group.length for group in groups]
        self.tokens[there] = self._sent(torch.tensor(tokens, dtype=torch.int64, device="cpu"))
        self.group_of_row[here] = self._sent(torch.tensor(owners, dtype=torch.int64, device="cpu"))
        lengths = [len(ids) for ids in rows]
        targets = torch.zeros(len(rows), self.room.length, dtype=torch.int64, device="cpu")
        for r, ids in enumerate(rows):
            targets[r, : len(ids)] = ids
        position = torch.arange(self.room.length, device="cpu")
        end = torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
        scored = (position >= self.inputs.given) & (position < end)
        wanted = torch.ceil(self.recipe.accuracy * scored.sum(1).float() - 1e-9).long()
        self.targets[here] = self._sent(targets)
        self.scored[here] = self._sent(scored)
        self.wanted[here] = self._sent(wanted)
        layout = self.inputs.lay_out(self.targets[here], lengths, self.layout.dtype)
        self.layout[here] = self._sent(layout)
        self.row_correct[here] = 0

    def _initial(self, group: Group) -> tuple[Tensor, Tensor]:
        """Draw e (n_e, K, d) and m (n_m, d) of a group, fp32, on the CPU."""
        prior = self.inputs.prior
        starts = [row.start for row in group.rows if row.start is not None]
        if starts:
            vectors = torch.stack(starts)
            e, m = vectors[:, : self.inputs.leading], vectors[:, -1]
            if group.share == "e":
                return e.mean(0, keepdim=True), m
            return e, m.mean(0, keepdim=True) if group.share == "m" else m
        if prior is None:
            return initial_vectors(group, self.inputs.leading, self.width, self.recipe.init_std)
        e, m = initial_vectors(group, self.inputs.leading, self.width, 1.0)
        return prior.mean[0] + prior.std[0] * e, prior.mean[1] + prior.std[1] * m

    def release(self, leaving: list[int]) -> None:
        """Take groups out, by their position; those behind them move up, in their order."""
        gone = set(leaving)
        kept_groups = [g for g in range(len(self.groups)) if g not in gone]
        owners = [g for g, group in enumerate(self.groups) for _ in group.rows]
        kept_rows = [r for r, g in enumerate(owners) if g not in gone]
        self._hold([self.groups[g] for g in kept_groups])
        by_row = [self.targets, self.scored, self.wanted, self.layout, self.row_correct]
        by_group = [
            self.tokens, self.step, self.best_correct, self.improved_at, self.best_margin,
            self.margin_bound, self.done, self.failed, self.cold_until, self.by_network,
            self.progressed_at, self.adam_from,
        ]  # fmt: skip
        for bank in self.banks:
            (by_group if bank.shared else by_row).extend(bank.buffers())
        rows, groups = len(owners), slice(len(kept_groups), len(kept_groups) + len(gone))
        for buffers, kept in ((by_row, kept_rows), (by_group, kept_groups)):
            index = self._sent(torch.tensor(kept, dtype=torch.int64, device="cpu"))
            for buffer in buffers:
                buffer[: len(kept)] = buffer.index_select(0, index)
        # A free place has nothing to score and vectors of zero, so that it adds zeros to whatever
        # it is summed with.
        for buffer in by_row:
            buffer[len(kept_rows) : rows] = 0
        for bank in self.banks:
            if bank.shared:
                bank.values[groups] = 0
        self._reset_groups(groups, done=True)
        place = {g: i for i, g in enumerate(kept_groups)}
        moved = [place[owners[r]] for r in kept_rows]
        self.group_of_row[: len(moved)] = self._sent(
            torch.tensor(moved, dtype=torch.int64, device="cpu")
        )
        self.group_of_row[len(moved) : rows] = 0

    def reopen(self, group: int, margin: float) -> None:
        """Let a group that was done go on, cold where the recipe says so, with `margin` to clear.

        Where less than all tokens are asked for no margin counts: then it is one more right token
        than it had, or the same vectors would be done again before they are updated.
        """
        self.done[group] = False
        self.margin_bound[group] = margin
        self.cool(slice(group, group + 1), torch.ones_like(self.done[:1]))
        if self.recipe.accuracy < 1.0:
            mine = self.group_of_row == group
            self.wanted.copy_(torch.where(mine, self.row_correct + 1, self.wanted))

    def rate_after(self, step: Tensor) -> Tensor:
        """Return the rate of the update that follows `step` updates by AdamW, (G,) like it."""
        groups = slice(len(step))
        return self.recipe.lr_at(step, self.tokens[groups], self.is_cold(groups))

    def cool(self, groups: slice, where: Tensor) -> None:
        """Make groups cold, where they are not, for as many updates again as they have made."""
        step, until = self.clock[groups], self.cold_until[groups]
        torch.where(where & (step >= until), 2 * step, until, out=until)

    def is_cold(self, groups: slice) -> Tensor:
        """Flag groups whose next update is a cold one: bool."""
        if self.recipe.cold is None:
            return torch.zeros_like(self.done[groups])
        return self.clock[groups] < self.cold_until[groups]

    def follow(self, window: Window) -> None:
        """Let means follow the vectors that were updated."""
        cold = self.is_cold(slice(window.groups))
        weight = torch.ones_like(cold, dtype=torch.float32).masked_fill_(cold, _WEIGHT)
        for bank in self.banks:
            of = slice(None) if bank.shared else self.group_of_row[: window.rows]
            n = window.groups if bank.shared else window.rows
            bank.mean[:n].lerp_(bank.values[:n], weight[of][:, None, None])

    def right_at_best(self, window: Window) -> Tensor:
        """Flag groups whose best vectors are as right as they are asked to be: (G,) bool."""
        rows = slice(window.rows)
        right = torch.ones_like(self.step[: window.groups])
        of_row = (self.row_correct[rows] >= self.wanted[rows]).long()
        right.scatter_reduce_(0, self.group_of_row[rows], of_row, "amin")
        return right > 0

    def spent(self) -> Tensor:
        """Flag groups that have made all updates their recipe grants: (room.groups,) bool."""
        over = self.clock >= self.recipe.max_steps
        if self.recipe.patience is not None:
            over |= self.step - self.improved_at >= self.recipe.patience
        return over

    def best_of(self, group: int) -> list[Tensor]:
        """Return e (n_e, K, d) and, where there is one, m (n_m, 1, d) of a group at their best."""
        return [bank.best[self._place_in(bank, group)] for bank in self.banks]

    def mean_of(self, group: int) -> list[Tensor]:
        """Return the running means of a group's vectors, in the shapes of `best_of`."""
        return [bank.mean[self._place_in(bank, group)] for bank in self.banks]

    def _place_in(self, bank: Bank, group: int) -> slice:
        if bank.shared:
            return slice(group, group + 1)
        return slice(*self.first_rows[group : group + 2])

    def _reset_groups(self, groups: slice, done: bool) -> None:
        self.step[groups] = 0
        self.best_correct[groups] = -1
        self.improved_at[groups] = 0
        self.best_margin[groups] = float("-inf")
        self.margin_bound[groups] = self.recipe.margin
        self.done[groups] = done
        self.failed[groups] = False
        self.cold_until[groups] = 0
        self.by_network[groups] = self.network is not None and not done
        self.progressed_at[groups] = 0
        self.adam_from[groups] = 0

    def _sent(self, tensor: Tensor) -> Tensor:
        """Send a tensor from host to device, without waiting for what the device is doing."""
        if self.device.type != "cuda" or tensor.is_cuda or not len(tensor):
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _halved(whole: int, needed: int) -> int:
    """Halve `whole` as often as it stays at least `needed`."""
    while whole > 1 and (whole + 1) // 2 >= needed:
        whole = (whole + 1) // 2
    return whole
