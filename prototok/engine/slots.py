"""The rows in flight, on the device: vectors, optimiser state, targets, best vectors so far.

Units enter and leave while others go on (continuous batching), so every tensor is indexed by one of
four things, and the index tensors tie them together. Letters: R rows, U units, n vectors of one
kind, K leading vectors, d hidden size, N targets (of the longest row), L input positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prototok.engine.inputs import Inputs
from prototok.engine.recipe import Recipe
from prototok.engine.rows import Unit, initial_vectors
from prototok_kernels.adamw_rows import AdamWState


@dataclass
class Bank:
    """All vectors of one kind, e or m, with what AdamW knows of them."""

    values: Tensor  # (n, k, d) fp32; k = K for e, 1 for m
    best: Tensor  # (n, k, d) the vectors that scored best
    adam: AdamWState  # over (n, k · d)
    unit: Tensor  # (n,) the unit each belongs to
    row: Tensor  # (R,) the vector each row uses

    def keep(self, kept: Tensor, kept_rows: Tensor, unit_place: Tensor) -> None:
        """Drop the vectors not in `kept` (n,) and renumber."""
        place = kept.cumsum(0) - 1
        index = kept.nonzero()[:, 0]
        self.values, self.best = self.values[index], self.best[index]
        self.adam = self.adam.rows(index)
        self.unit = unit_place[self.unit[index]]
        self.row = place[self.row[kept_rows]]

    def add(self, values: Tensor, unit: int, rows: int) -> None:
        """Append one unit's vectors: one for each of its rows, or one for all."""
        device = self.values.device
        values = values.to(device)
        start, count = len(self.values), len(values)
        own = torch.arange(count, device=device) if count == rows else torch.zeros(rows).long()
        self.values = torch.cat([self.values, values])
        self.best = torch.cat([self.best, values])
        self.adam = self.adam.extended(AdamWState.zeros(values.flatten(1)))
        self.unit = torch.cat([self.unit, torch.full((count,), unit, device=device)])
        self.row = torch.cat([self.row, own.to(device) + start])


class Slots:
    """The rows in flight; `admit` and `release` are the only ways in and out."""

    def __init__(
        self, inputs: Inputs, recipe: Recipe, width: int, device: torch.device,
        dtype: torch.dtype, backend: str,
    ) -> None:  # fmt: skip
        self.inputs, self.recipe, self.device, self.dtype = inputs, recipe, device, dtype
        self.backend = backend
        self.units: list[Unit] = []

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def bank(vectors: int) -> Bank:
            values = empty(0, vectors, width, dtype=torch.float32)
            adam = AdamWState.zeros(values.flatten(1))
            return Bank(values, values.clone(), adam, empty(0), empty(0))

        self.banks = [bank(inputs.leading)] + ([bank(1)] if inputs.has_m else [])
        # by unit
        self.step = empty(0)  # updates made
        self.best_correct = empty(0)
        self.improved_at = empty(0)  # step of the best correct
        self.best_margin = empty(0, dtype=torch.float32)
        self.margin_bound = empty(0, dtype=torch.float32)
        self.done = empty(0, dtype=torch.bool)
        # by row
        self.unit_of_row = empty(0)
        self.row_correct = empty(0)  # of the best vectors
        self._lay_out()

    @property
    def rows(self) -> int:
        return len(self.unit_of_row)

    def admit(self, units: list[Unit]) -> None:
        """Put units in, with fresh vectors and optimiser state."""
        for unit in units:
            number, rows = len(self.units), len(unit.rows)
            vectors = initial_vectors(
                unit, self.inputs.leading, self.banks[0].values.shape[-1], self.recipe.init_std
            )
            for bank, values in zip(self.banks, vectors, strict=False):
                bank.add(values.view(len(values), -1, values.shape[-1]), number, rows)
            self.units.append(unit)
            self.step = F.pad(self.step, (0, 1), value=0)
            self.best_correct = F.pad(self.best_correct, (0, 1), value=-1)
            self.improved_at = F.pad(self.improved_at, (0, 1), value=0)
            self.best_margin = F.pad(self.best_margin, (0, 1), value=float("-inf"))
            self.margin_bound = F.pad(self.margin_bound, (0, 1), value=self.recipe.margin)
            self.done = F.pad(self.done, (0, 1), value=False)
            self.unit_of_row = F.pad(self.unit_of_row, (0, rows), value=number)
            self.row_correct = F.pad(self.row_correct, (0, rows), value=0)
        self._lay_out()

    def release(self, leaving: list[int]) -> None:
        """Take units out, by their position."""
        gone = set(leaving)
        self.units = [unit for u, unit in enumerate(self.units) if u not in gone]
        kept = torch.ones_like(self.done)
        kept[leaving] = False
        place = kept.cumsum(0) - 1
        kept_rows = kept[self.unit_of_row]
        for bank in self.banks:
            bank.keep(kept[bank.unit], kept_rows, place)
        for name in (
            "step", "best_correct", "improved_at", "best_margin", "margin_bound", "done",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[kept])
        self.unit_of_row = place[self.unit_of_row[kept_rows]]
        self.row_correct = self.row_correct[kept_rows]
        self._lay_out()

    def spent(self) -> Tensor:
        """(U,) bool: units that have made all the updates their recipe grants them."""
        over = self.step >= self.recipe.max_steps
        if self.recipe.patience is not None:
            over |= self.step - self.improved_at >= self.recipe.patience
        return over

    def _lay_out(self) -> None:
        """Targets, scored positions and layout of all rows, padded to the longest."""
        targets = [row.targets for unit in self.units for row in unit.rows]
        length = max((len(ids) for ids in targets), default=0)
        self.length = length
        self.lengths = torch.tensor([len(ids) for ids in targets], dtype=torch.int64).to(
            self.device
        )
        self.targets = torch.zeros(len(targets), length, dtype=torch.int64)
        for r, ids in enumerate(targets):
            self.targets[r, : len(ids)] = ids
        self.targets = self.targets.to(self.device)
        self.layout = self.inputs.lay_out(self.targets, [len(ids) for ids in targets], self.dtype)
        position = torch.arange(length, device=self.device)
        # (R, N)
        self.scored = (position >= self.inputs.given) & (position < self.lengths[:, None])
        self.wanted = torch.ceil(self.recipe.accuracy * self.scored.sum(1) - 1e-9).long()  # (R,)
