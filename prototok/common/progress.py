"""Progress of long work: a bar on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_PLAIN_EVERY = 30.0


class Progress:
    """`shown`: None shows a bar on a terminal only, True insists elsewhere too, False is quiet."""

    def __init__(self, total: int, what: str, shown: bool | None) -> None:
        self.total, self.what, self.done = total, what, 0
        self.note = ""
        terminal = sys.stderr.isatty()
        self.plain = bool(shown) and not terminal
        self.started = self.printed = time.monotonic()
        self.bar = None
        if terminal and shown is not False:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task(what, total=total, note="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, note: str) -> None:
        self.done, self.note = done, note
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif self.plain and time.monotonic() - self.printed >= _PLAIN_EVERY:
            self.printed = time.monotonic()
            spent = self.printed - self.started
            print(f"{self.what}: {done}/{self.total} after {spent:.0f} s, {note}", file=sys.stderr)
