"""Progress of long work: a bar on a terminal or in a notebook, now and then a line elsewhere."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol


class _View(Protocol):
    """One way of showing how far the work is; `every` seconds at most once."""

    every: float
    stays: bool  # what it shows last

    def open(self) -> None: ...

    def show(self, done: int, note: str) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Shows `done` of `total`, and a note; a total that is not known is None.

    `shown`: None shows a bar on a terminal or in a notebook only, True insists on lines elsewhere,
    False is quiet. `steady`: one piece of the work takes about as long as another, so that what is
    done tells how long the rest may take; it is said behind the note.
    """

    def __init__(
        self, total: int | None, what: str, shown: bool | None, steady: bool = False
    ) -> None:
        self.view: _View | None = None
        self.total, self.steady = total, steady
        self.first: tuple[int, float] | None = None  # what was done at the first update, and when
        self.last: tuple[int, str | Callable[[], str]] | None = None
        if shown is False:
            return
        if sys.stderr.isatty():
            self.view = _Terminal(total, what)
        elif _in_notebook():
            self.view = _Notebook(total, what)
        elif shown:
            self.view = _Lines(total, what)
        self.next = time.monotonic() + (self.view.every if self.view else 0.0)

    def __enter__(self) -> Progress:
        if self.view is not None:
            self.view.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.view is not None:
            if self.view.stays and self.last is not None:
                self.view.show(self.last[0], self._made(*self.last))
            self.view.close()

    def update(self, done: int, note: str | Callable[[], str]) -> None:
        """Say how much is done, unless something was said a moment ago.

        A note that takes work is a function, called only where it is shown.
        """
        self.last = done, note
        if self.view is None:
            return
        now = time.monotonic()
        self.first = self.first or (done, now)
        if now < self.next:
            return
        self.next = now + self.view.every
        self.view.show(done, self._made(done, note))

    def _made(self, done: int, note: str | Callable[[], str]) -> str:
        said = note if isinstance(note, str) else note()
        before, since = self.first or (done, 0.0)
        if not self.steady or self.total is None or not before < done < self.total:
            return said
        left = (time.monotonic() - since) / (done - before) * (self.total - done)
        return f"{said}, about {duration(left)} left"

    def say(self, line: str) -> None:
        """Print a line on stderr that stays, where progress is shown at all; after the bar."""
        if self.view is not None:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time as people say it: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _of(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"


class _Terminal:
    """A bar over a line of notes; both go when the work is over."""

    every, stays = 0.2, False

    def __init__(self, total: int | None, what: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self.task = self.bar.add_task(what, total=total)
        self.live = Live(self.bar, console=Console(stderr=True), transient=True)

    def open(self) -> None:
        self.live.start()

    def show(self, done: int, note: str) -> None:
        from rich.console import Group
        from rich.text import Text

        self.bar.update(self.task, completed=done)
        self.live.update(Group(self.bar, Text(note)))

    def close(self) -> None:
        self.live.stop()


class _Notebook:
    """A bar of HTML alone, for a notebook may have no widgets; its last state stays."""

    every, stays = 0.5, True

    def __init__(self, total: int | None, what: str) -> None:
        from IPython.display import HTML

        self.total, self.what, self.page = total, what, HTML
        self.started = time.monotonic()

    def open(self) -> None:
        from IPython.display import display

        self.handle = display(self.page(self._drawn(0, "")), display_id=True)

    def _drawn(self, done: int, note: str) -> str:
        spent = time.monotonic() - self.started
        says = f"{self.what} {_of(done, self.total)}, {spent:.0f} s"
        how_far = "" if self.total is None else f' value="{done}" max="{self.total}"'
        return f"<progress{how_far}></progress> {html.escape(says + (f', {note}' if note else ''))}"

    def show(self, done: int, note: str) -> None:
        self.handle.update(self.page(self._drawn(done, note)))

    def close(self) -> None:
        pass


class _Lines:
    """A line now and then, for logs."""

    every, stays = 30.0, False

    def __init__(self, total: int | None, what: str) -> None:
        self.total, self.what = total, what
        self.started = time.monotonic()

    def open(self) -> None:
        pass

    def show(self, done: int, note: str) -> None:
        spent = time.monotonic() - self.started
        print(
            f"{self.what}: {_of(done, self.total)} after {spent:.0f} s, {note}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def close(self) -> None:
        pass


def _in_notebook() -> bool:
    """Return True in a Jupyter kernel; IPython on a terminal has none."""
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python is not None else None
    return hasattr(shell, "kernel")
