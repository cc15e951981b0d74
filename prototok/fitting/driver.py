"""One driver for every fit: units through the engine, each row verified alone, results collected.

Fits of [e, m, …, m] and of [mem] differ in the inputs of their `Setup`, in how a row is verified,
and in what is collected. Letters: N targets of a row, d hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from prototok.common.progress import Progress
from prototok.fitting.engine.rows import Row, Unit
from prototok.fitting.engine.run import Finished, FitEvent, run
from prototok.fitting.engine.setup import Setup
from prototok.results.fit_result import FitInterrupted, FitResult
from prototok.results.mem_fit import MemFit


class Check(Protocol):
    """What a row gives when it is verified alone."""

    @property
    def accuracy(self) -> float: ...

    @property
    def exact(self) -> bool: ...


C = TypeVar("C", bound=Check)
R = TypeVar("R", FitResult, MemFit)
Verify = Callable[[Setup, Tensor, Tensor], C]  # of targets (N,) and vectors (slots, d)


@dataclass(frozen=True)
class EndedRow(Generic[C]):
    """A row whose fit ended.

    group              the sharing group it is of
    vectors            (slots, d) fp32 on the CPU, the ones that scored
    check              what they give when verified alone
    accuracy_in_batch  token accuracy in the batch that they were fitted in
    steps              updates made
    seconds            the row's share of the wall time of its batches
    """

    row: Row
    group: int
    vectors: Tensor
    check: C
    accuracy_in_batch: float
    steps: int
    seconds: float


def fit_units(
    setup: Setup, units: list[Unit], verify: Verify[C], observe: Callable[[FitEvent], None]
) -> Iterator[tuple[Unit, list[EndedRow[C]]]]:
    """Fit units and yield each with its rows as it ends, every row verified alone."""
    verified: dict[int, list[C]] = {}

    def confirm(finished: Finished) -> bool:
        rows = zip(finished.unit.rows, _vectors_by_row(finished), strict=True)
        checks = [verify(setup, row.targets, vectors) for row, vectors in rows]
        verified[finished.unit.group] = checks
        return all(check.accuracy >= setup.recipe.accuracy for check in checks)

    setup.lm.cast(torch.float32)  # its memory is taken before `run` sizes batches by what is free
    for finished in run(setup, units, confirm, observe):
        checks = verified.pop(finished.unit.group)
        yield finished.unit, list(_ended(finished, checks))


def _ended(finished: Finished, checks: list[C]) -> Iterator[EndedRow[C]]:
    vectors = _vectors_by_row(finished)
    for r, row in enumerate(finished.unit.rows):
        yield EndedRow(
            row=row,
            group=finished.unit.group,
            vectors=vectors[r],
            check=checks[r],
            accuracy_in_batch=finished.correct[r] / len(row.targets),
            steps=finished.steps,
            seconds=finished.seconds,
        )


def _vectors_by_row(finished: Finished) -> list[Tensor]:
    """(slots, d) for each row of a unit."""
    rows = len(finished.unit.rows)
    parts = [part.expand(rows, -1, -1) if len(part) == 1 else part for part in finished.vectors]
    return list(torch.cat(parts, dim=1))


@dataclass(frozen=True)
class Watching:
    """Who looks on: the bar's name, whether it is shown (see `Progress`), the user's callback."""

    what: str
    progress: bool | None
    callback: Callable[[FitEvent], None] | None


def fit_all(
    setup: Setup,
    units: list[Unit],
    verify: Verify[C],
    collect: Callable[[list[EndedRow[C]]], R],
    watching: Watching,
) -> R:
    """Fit all units and collect their rows, text by text.

    Raises:
        FitInterrupted: Ctrl-C; carries what was collected of the texts whose rows had all ended.
    """
    asked = Counter(row.text for unit in units for row in unit.rows)
    bar = Progress(asked.total(), watching.what, watching.progress)
    ended: list[EndedRow[C]] = []
    exact = 0

    def observe(event: FitEvent) -> None:
        steps = f"{len(event.rows)} in flight, the oldest at step {int(event.steps.max())}"
        bar.update(len(ended), f"{exact} exact, {steps}")
        if watching.callback is not None:
            watching.callback(event)

    def in_order(rows: list[EndedRow[C]]) -> list[EndedRow[C]]:
        return sorted(rows, key=lambda one: one.row.index)

    try:
        with bar:
            for _, rows in fit_units(setup, units, verify, observe):
                ended += rows
                exact += sum(one.check.exact for one in rows)
    except KeyboardInterrupt:
        there = Counter(one.row.text for one in ended)
        texts = sorted(text for text, rows in there.items() if rows == asked[text])
        kept = in_order([one for one in ended if one.row.text in texts])
        raise FitInterrupted(collect(kept) if kept else None, texts) from None
    return collect(in_order(ended))


def require_room_for(targets: list[Tensor], require: Callable[[int], None]) -> None:
    """ValueError naming the first text whose length `require` refuses."""
    for i, ids in enumerate(targets):
        try:
            require(len(ids))
        except ValueError as error:
            raise ValueError(f"texts: text {i} is too long; {error}") from None


def columns_of(
    rows: list[EndedRow[C]], seeds: int, read: Callable[[EndedRow[C]], float], dtype: torch.dtype
) -> Tensor:
    """(texts, seeds): one number of each row, rows text by text."""
    return torch.tensor([read(one) for one in rows], dtype=dtype).view(-1, seeds)
