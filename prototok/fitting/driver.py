"""One driver for every fit: groups through the engine, each row verified alone, results collected.

Fits of [e, m, …, m] and of [mem] differ in the inputs of their `Setup`, in how a row is verified,
and in what is collected. Letters: N targets of a row, d hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from prototok.common.progress import Progress
from prototok.common.urgent import urgent
from prototok.fitting.engine.rows import Group, Row
from prototok.fitting.engine.run import Finished, FitEvent, Refused, by_row, run
from prototok.fitting.engine.setup import Setup
from prototok.fitting.outlook import Outlook
from prototok.fitting.recipe import Recipe
from prototok.fitting.under_way import UnderWay
from prototok.results.fit_result import FitInterrupted, FitResult
from prototok.results.mem_fit import MemFit


class Check(Protocol):
    """The result of verifying a row alone."""

    @property
    def accuracy(self) -> float: ...

    @property
    def exact(self) -> bool: ...

    @property
    def margin(self) -> float: ...

    @property
    def spread(self) -> float: ...

    def as_failed(self) -> Self: ...


C = TypeVar("C", bound=Check)
R = TypeVar("R", FitResult, MemFit)
# Of rows alone, each its targets (N,) and vectors (slots, d).
Verify = Callable[[Setup, Sequence[tuple[Tensor, Tensor]]], list[C]]


@dataclass(frozen=True)
class EndedRow(Generic[C]):
    """A row whose fit ended.

    group              the sharing group it is of
    vectors            (slots, d) fp32 on the CPU, the ones that scored
    check              what they give when verified alone
    accuracy_in_batch  token accuracy in the batch that they were fitted in
    steps              updates made
    seconds            the row's share of the wall time of its batches
    failed             its loss or gradient was not finite: it ended there, and that is all it is
    """

    row: Row
    group: int
    vectors: Tensor
    check: C
    accuracy_in_batch: float
    steps: int
    seconds: float
    failed: bool


def fit_groups(
    setup: Setup, groups: list[Group], verify: Verify[C], observe: Callable[[FitEvent], None]
) -> Iterator[tuple[Group, list[EndedRow[C]]]]:
    """Fit groups and yield each with its rows as it ends, every row verified alone."""
    verified: dict[int, list[C]] = {}

    def confirm(finished: list[Finished]) -> list[Refused | None]:
        rows = [
            (row.targets, vectors)
            for one in finished
            for row, vectors in zip(
                one.group.rows, by_row(one.vectors, len(one.group.rows)), strict=True
            )
        ]
        with urgent(setup.lm.device):  # the next steps are queued already
            checks = iter(verify(setup, rows))
        mine = [[next(checks) for _ in one.group.rows] for one in finished]
        verified.update(zip((one.group.index for one in finished), mine, strict=True))
        return [_refused(some, setup.recipe) for some in mine]

    setup.lm.cast(torch.float32)  # its memory is taken before `run` sizes batches by what is free
    for finished in run(setup, groups, confirm, observe):
        checks = verified.pop(finished.group.index)
        yield finished.group, list(_ended(finished, checks))


def _refused(checks: Sequence[Check], recipe: Recipe) -> Refused | None:
    """Return None if rows alone are as right as `recipe` asks, by more than rounding moves them."""
    exact = all(check.accuracy >= recipe.accuracy for check in checks)
    asked = [recipe.spreads * check.spread for check in checks]
    clear = all(check.margin >= least for check, least in zip(checks, asked, strict=True))
    # Where less than all tokens are asked for no margin counts.
    counts = recipe.spreads > 0 and recipe.accuracy == 1.0
    if exact and (clear or not counts):
        return None
    # What is wrong alone has no rounding to clear yet: it is looked at again a little later.
    return Refused(max(asked) if exact else 0.0, exact)


def _ended(finished: Finished, checks: list[C]) -> Iterator[EndedRow[C]]:
    vectors = by_row(finished.vectors, len(finished.group.rows))
    for r, row in enumerate(finished.group.rows):
        yield EndedRow(
            row=row,
            group=finished.group.index,
            vectors=vectors[r],
            check=checks[r].as_failed() if finished.failed else checks[r],
            accuracy_in_batch=0.0 if finished.failed else finished.correct[r] / len(row.targets),
            steps=finished.steps,
            seconds=finished.seconds,
            failed=finished.failed,
        )


@dataclass(frozen=True)
class Watching:
    """Watchers of a fit: the bar's name, if it is shown (see `Progress`), the user's callbacks.

    `on_text` gets the place of a text and what is collected of it as soon as its rows have ended;
    what `afterwards` makes of the whole is printed where progress is shown.
    """

    what: str
    progress: bool | None
    callback: Callable[[FitEvent], None] | None
    on_text: Callable[[int, Any], None] | None = None
    afterwards: Callable[[Any], str | None] | None = None


def fit_all(
    setup: Setup,
    groups: list[Group],
    verify: Verify[C],
    collect: Callable[[list[EndedRow[C]]], R],
    watching: Watching,
) -> R:
    """Fit all groups and collect their rows, text by text.

    Raises:
        FitInterrupted: Ctrl-C; carries what was collected of the texts whose rows had all ended.
    """
    asked = Counter(row.text for group in groups for row in group.rows)
    ended: dict[int, list[EndedRow[C]]] = {text: [] for text in asked}  # by text
    under_way = UnderWay(groups, setup)
    bar = Progress(asked.total(), watching.what, watching.progress)
    rows_ended = exact = failed = 0
    lengths = {row.index: len(row.targets) for group in groups for row in group.rows}
    ends: dict[int, int] = {}
    if setup.recipe.cycle is not None and setup.inputs.is_pair:
        for group in groups:
            end = setup.recipe.end_of_cycle(0, group.length)
            ends |= dict.fromkeys((row.index for row in group.rows), end)
    outlook = Outlook(lengths, ends)

    def note() -> str:
        lost = f"{failed} failed, not finite; " if failed else ""
        return f"{lost}{outlook.note()}{exact} exact, {under_way.note()}"

    def observe(event: FitEvent) -> None:
        outlook.see(event)
        under_way.see(event)
        bar.update(rows_ended, note)
        if watching.callback is not None:
            watching.callback(event)

    def collected(texts: Iterable[int]) -> R:
        rows = [one for text in texts for one in ended[text]]
        return collect(sorted(rows, key=lambda one: one.row.index))

    try:
        with bar:
            for group, rows in fit_groups(setup, groups, verify, observe):
                for one in rows:
                    ended[one.row.text].append(one)
                    outlook.behind.discard(one.row.index)
                if watching.on_text is not None and group.share is None:
                    text = rows[0].row.text
                    if len(ended[text]) == asked[text]:
                        watching.on_text(text, collected([text]))
                rows_ended += len(rows)
                exact += sum(one.check.exact for one in rows)
                failed += sum(one.failed for one in rows)
                under_way.end(rows)
                bar.update(rows_ended, note)
    except KeyboardInterrupt:
        texts = sorted(text for text, rows in ended.items() if len(rows) == asked[text])
        raise FitInterrupted(collected(texts) if texts else None, texts) from None
    whole = collected(ended)
    if watching.afterwards is not None and (line := watching.afterwards(whole)) is not None:
        bar.say(line)
    return whole


def require_room_for(targets: list[Tensor], require: Callable[[int], None]) -> None:
    """Raise ValueError naming the first text whose length `require` refuses."""
    for i, ids in enumerate(targets):
        try:
            require(len(ids))
        except ValueError as error:
            raise ValueError(f"texts: text {i} is too long; {error}") from None


def columns_of(
    rows: list[EndedRow[C]], seeds: int, read: Callable[[EndedRow[C]], float], dtype: torch.dtype
) -> Tensor:
    """Read one number of each row into (texts, seeds); rows are text by text."""
    return torch.tensor([read(one) for one in rows], dtype=dtype, device="cpu").view(-1, seeds)
