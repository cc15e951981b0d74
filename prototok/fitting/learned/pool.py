"""Rows that a network is trained on: its own trajectories.

A pool of rows is always under way. Each step scores all rows where the network's last update left
them; the gradient there is what that update is trained by, and at once what the next one sees. So a
step of training costs one forward and backward of the frozen model, and no trajectory is stored.
Letters: R rows of a pool, N targets, T texts, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prototok.fitting.engine.learned import adam_move, seen_of
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots, Window
from prototok.fitting.engine.step import forward_backward
from prototok.fitting.learned.encoder import Encoder

_POSITIONS = 1024  # of a pool, rows × targets; at few tokens more steps of fewer rows learn faster
_SOFT = 0.3  # nats added to a row's loss in the logarithm, so that rows that are solved weigh less
_LEAVE = 0.3  # margin from which on a row has nothing more to teach

_FORGET = 0.98


@dataclass(frozen=True)
class Corpus:
    """Texts that windows are cut from at random, each (N,) int64 on the CPU."""

    texts: list[Tensor]

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Return windows (count, length)."""
        which = torch.randint(len(self.texts), (count,), generator=generator, device="cpu")
        where = torch.rand(count, generator=generator, device="cpu", dtype=torch.float64)
        found = []
        for text, part in zip(which.tolist(), where.tolist(), strict=True):
            ids = self.texts[text]
            start = int(part * (len(ids) - length + 1))
            found.append(ids[start : start + length])
        return torch.stack(found)


class Pool:
    """Rows of one length under way, in slots of the engine.

    A row leaves when it is solved, when it has made the updates it is granted, or when it is not
    finite; another text takes its place. Where there is an encoder that takes texts of this length,
    every other place starts at its guess.
    """

    def __init__(
        self,
        setup: Setup,
        corpus: Corpus,
        length: int,
        generator: torch.Generator,
        encoder: Encoder | None = None,
        positions: int | None = None,
        horizon: int | None = None,
        near: float = 0.0,
    ) -> None:
        assert setup.network is not None
        rows = max(8, (positions or _POSITIONS) // length)
        self.setup, self.network, self.corpus = setup, setup.network, corpus
        self.length, self.generator, self.near = length, generator, near
        self.slots = Slots(setup, Room(rows, rows, length))
        ids = corpus.draw(rows, length, generator)
        self.slots.admit([Group(r, (Row(r, r, 0, row),), None) for r, row in enumerate(ids)])
        self.window = Window(rows, rows, length)
        self.most = horizon or max(16, length * length // 4)
        takes = encoder is not None and length <= encoder.longest
        self.guess = encoder.guesser(setup.lm) if encoder is not None and takes else None
        # The first rows leave at different times, so that the pool soon holds rows of all ages.
        granted = torch.randint(1, 1 + self.most, (rows,), generator=generator, device="cpu")
        self.granted = granted.to(self.slots.device)
        self.pending: Tensor | None = None  # (R, 2, d) updates just made, with their graph
        # Rows that left, those solved, and the updates of these: sums that forget.
        self.fared = torch.zeros(3, dtype=torch.float64, device="cpu")

    def note(self) -> str:
        """Return in words how the rows that left of late have fared."""
        left, solved, updates = self.fared
        if not solved:
            return f"N = {self.length}: none solved yet"
        return f"N = {self.length}: {solved / left:.2f} solved, in {updates / solved:.1f} updates"

    def train_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Score all rows, train the updates that led here, and make the next ones."""
        slots, window, lm = self.slots, self.window, self.setup.lm
        leaves = [bank.values.detach().requires_grad_() for bank in slots.banks]
        grads = forward_backward(lm, slots, leaves, slice(0, window.rows))
        for bank, grad in zip(slots.banks, grads, strict=True):
            bank.grad.copy_(grad)
        finite = [bank.grad.isfinite().flatten(1).all(1) for bank in slots.banks]
        good = finite[0] & finite[1] & slots.loss.isfinite()
        if self.pending is not None:
            self._learn(optimizer, self.pending, good)
        solved = good & (slots.correct == self.length) & (slots.margin >= _LEAVE)
        leaving = solved | ~good | (slots.step >= self.granted)
        counts = torch.stack([leaving.sum(), solved.sum(), slots.step[solved].sum()])
        self.fared = _FORGET * self.fared + counts.cpu()
        self._replace(leaving.nonzero()[:, 0])
        self.pending = self._move(~leaving)

    def _learn(self, optimizer: torch.optim.Optimizer, pending: Tensor, good: Tensor) -> None:
        """Descend on the mean of log(0.3 + nats a token) + near · the mean square distance.

        The distance is that from where fits start, by coordinate, in spreads. It goes through the
        pending updates alone.
        """
        slots, t, scale = self.slots, self.setup.recipe.temperature, self.network.scale
        nats = t * slots.loss / self.length
        weight = torch.where(good, t / self.length / (_SOFT + nats) / len(nats), 0.0)[:, None]
        share = self.near / slots.width / len(nats)
        nearer = torch.zeros_like(nats).masked_fill_(good, share)[:, None]
        # A row that came after the last score has an update of zero pending, with no graph.
        signal = [
            bank.turned(weight * bank.grad[:, 0] + nearer * (bank.values[:, 0] - mean) / scale**2)
            for bank, mean in zip(slots.banks, self.network.mean, strict=True)
        ]
        optimizer.zero_grad(set_to_none=True)
        pending.backward(torch.stack(signal, dim=1).nan_to_num(0.0, 0.0, 0.0))
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        optimizer.step()

    def _move(self, moving: Tensor) -> Tensor:
        """Update rows that have a gradient, and return the updates with their graph."""
        slots, window, lm = self.slots, self.window, self.setup.lm
        backend = lm.plan(window.rows, self.length, slots.backend).update.taken
        rate = torch.ones_like(slots.loss)
        moves = [adam_move(bank, rate, moving, slots, backend) for bank in slots.banks]
        half = lm.dtype == torch.bfloat16
        # Without the cache: inside another autocast it would keep the weights of the first step.
        with torch.autocast(slots.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            made = self.network(seen_of(lm, slots, window, moves))
        made = torch.where(moving[:, None, None], made, 0.0)
        for bank, update in zip(slots.banks, made.detach().unbind(1), strict=True):
            bank.values.add_(bank.turned_back(update)[:, None])
        slots.step += moving
        return made

    def _replace(self, rows: Tensor) -> None:
        """Put fresh texts in these places, without a gradient yet."""
        slots, prior = self.slots, self.setup.inputs.prior
        assert prior is not None
        if not len(rows):
            return
        ids = self.corpus.draw(len(rows), self.length, self.generator)
        ids = ids.to(slots.device)
        slots.targets[rows] = ids
        for i, bank in enumerate(slots.banks):
            noise = torch.randn(
                len(rows), slots.width, generator=self.generator, device="cpu", dtype=torch.float32
            )
            bank.values[rows, 0] = (prior.mean[i] + prior.std[i] * noise).to(slots.device)
            bank.grad[rows] = 0
            for zeroed in bank.buffers()[2:]:
                zeroed[rows] = 0
        if self.guess is not None:
            guessed = rows % 2 == 1
            lengths = torch.full_like(rows[guessed], self.length)
            with torch.no_grad():
                made = self.guess(ids[guessed], lengths).to(slots.device)
            for bank, vectors in zip(slots.banks, made.unbind(1), strict=True):
                bank.values[rows[guessed], 0] = vectors
        slots.step[rows] = slots.correct[rows] = 0
        slots.loss[rows] = slots.margin[rows] = 0.0
        slots.errors[rows] = slots.margins[rows] = 0.0
        self.granted[rows] = self.most
