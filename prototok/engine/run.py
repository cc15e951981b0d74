"""The loop: units from a queue through the slots to their results."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.allocator import keep_freed_memory
from prototok.engine.inputs import Inputs
from prototok.engine.recipe import Recipe
from prototok.engine.rows import Unit
from prototok.engine.slots import Slots
from prototok.engine.step import StepScore, step
from prototok.frozen_lm import FrozenLM

_CPU_TOKENS = 2048  # positions a forward on the CPU; more gains nothing and leaves the caches


@dataclass(frozen=True)
class Finished:
    """A unit that ended: the vectors that scored, on the CPU, and what it took."""

    unit: Unit
    vectors: list[Tensor]  # e (n_e, K, d) and, where there is one, m (n_m, 1, d); fp32
    correct: list[int]  # right tokens in the batch it was fitted in, row by row
    steps: int
    seconds: float  # a row's share of the time the batch took


@dataclass(frozen=True)
class FitEvent:
    """What a callback of `fast_fit` sees after each look at the device.

    rows    (R,) places in the results (text × seeds + seed) of the rows in flight
    steps   (R,) updates made before this score
    loss    (R,) nats, summed over the row's targets; correct (R,) and margin (R,) likewise by row
    """

    rows: Tensor
    steps: Tensor
    loss: Tensor
    correct: Tensor
    margin: Tensor


def run(
    lm: FrozenLM,
    units: list[Unit],
    inputs: Inputs,
    recipe: Recipe,
    batch_size: int | str,
    backend: str,
    confirm: Callable[[Finished], bool],
    observe: Callable[[FitEvent], None],
) -> Iterator[Finished]:
    """Fit all units and yield each as it ends.

    A unit that reached the recipe's goal is shown to `confirm`; one that does not hold there goes
    on with a higher margin to clear, until its updates are spent. Units are taken longest first so
    that rows of similar length share a batch.
    """
    if lm.device.type == "cpu":
        keep_freed_memory()
    queue = deque(sorted(units, key=lambda unit: -unit.length))
    slots = Slots(inputs, recipe, lm.hidden_size, lm.device, lm.dtype, backend)
    longest = inputs.input_length(max(unit.length for unit in units))
    rows_per_forward = _rows_that_fit(lm, longest) if batch_size == "auto" else int(batch_size)
    # On CUDA each look at the flags costs a synchronisation; on the CPU it is free.
    poll_every = 1 if lm.device.type == "cpu" else 10
    seconds: dict[int, float] = {}
    while queue or slots.units:
        admitted = []
        rows = slots.rows
        while queue and (rows == 0 or rows + len(queue[0].rows) <= rows_per_forward):
            admitted.append(queue.popleft())
            rows += len(admitted[-1].rows)
        if admitted:
            slots.admit(admitted)
        clock = time.perf_counter()
        for _ in range(poll_every):
            before = slots.step.clone()
            score, rows_per_forward = _step_within_memory(lm, slots, rows_per_forward)
        observe(_event(slots, before, score))
        spent = slots.spent().tolist()
        share = (time.perf_counter() - clock) / slots.rows
        for unit in slots.units:
            seconds[unit.group] = seconds.get(unit.group, 0.0) + share
        leaving = []
        for u in (slots.done | slots.spent()).nonzero()[:, 0].tolist():
            finished = _take(slots, u, seconds)
            if confirm(finished) or spent[u]:
                leaving.append(u)
                yield finished
            else:
                slots.done[u] = False
                slots.margin_bound[u] = max(0.05, 2 * float(slots.best_margin[u]))
        if leaving:
            slots.release(leaving)


def _take(slots: Slots, u: int, seconds: dict[int, float]) -> Finished:
    mine = slots.unit_of_row == u
    return Finished(
        unit=slots.units[u],
        vectors=[bank.best[bank.unit == u].cpu() for bank in slots.banks],
        correct=slots.row_correct[mine].tolist(),
        steps=int(slots.step[u]),
        seconds=seconds[slots.units[u].group],
    )


def _event(slots: Slots, steps: Tensor, score: StepScore) -> FitEvent:
    rows = torch.tensor([row.index for unit in slots.units for row in unit.rows])
    return FitEvent(
        rows, steps[slots.unit_of_row].cpu(), score.loss.cpu(), score.correct.cpu(),
        score.margin.cpu(),
    )  # fmt: skip


def _step_within_memory(lm: FrozenLM, slots: Slots, rows_per_forward: int) -> tuple[StepScore, int]:
    """One step; on out-of-memory the same step again with half the rows at a time."""
    while True:
        try:
            return step(lm, slots, rows_per_forward), rows_per_forward
        except torch.OutOfMemoryError:
            rows = min(rows_per_forward, slots.rows)
            if rows == 1:
                raise
            rows_per_forward = rows // 2
            torch.cuda.empty_cache()


def _rows_that_fit(lm: FrozenLM, length: int) -> int:
    """`batch_size="auto"`: rows a forward, from the memory that is free."""
    if lm.device.type != "cuda":
        return max(1, _CPU_TOKENS // length)
    free, _ = torch.cuda.mem_get_info(lm.device)
    layers = getattr(lm.config, "num_hidden_layers", 12)
    wide = getattr(lm.config, "intermediate_size", None) or 4 * lm.hidden_size
    # What a layer keeps for its backward: about twelve tensors of width d and four of the MLP's.
    a_token = layers * (12 * lm.hidden_size + 4 * wide) * lm.dtype.itemsize
    if lm.body.head is None:
        a_token += 3 * lm.vocab_size * 4
    return max(1, int(0.8 * free) // (a_token * length))
