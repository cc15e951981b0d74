"""Shared by all commands: options, lines on stderr, and exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from prototok.common.arguments import is_count

Model = Annotated[str, typer.Option(help="Hub id, folder, tiny-llama or tiny-neox.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32, …")]
RESUME = "Go on where the same command with this book and these settings was stopped."
PREFIX = "Text in front of e in every row, not fitted; none, or auto to leave it to the recipe."
SHAPE = (
    "A published shape with random weights, for speed alone: pythia-160m, pythia-410m, "
    "pythia-1.4b, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b."
)


def say(line: str) -> None:
    """Print a line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def front_asked(prefix: str) -> str | None:
    """Return what --prefix asks for, as `fast_fit` takes it."""
    return None if prefix == "none" else prefix


def cannot_go_on(out: Path, error: OSError, kept: str) -> typer.Exit:
    """Say that the disk takes no more and what is there already; return how the command ends."""
    say(
        f"prototok: out: {out} cannot be written any more ({error.strerror or error}); {kept}, and "
        "--resume goes on from there"
    )
    return typer.Exit(3)


def require_positive(**values: int | None) -> None:
    """Raise ValueError where an option that was given is less than 1, or huge."""
    for name, value in values.items():
        if value is not None and not is_count(value):
            raise ValueError(f"{name}: {value} is not a positive integer")


def run(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command line called `name`; a ValueError becomes one sentence and exit code 2.

    SIGTERM does what Ctrl-C does, so that whoever stops us finds the work saved. Characters that
    the terminal's encoding lacks are shown as question marks rather than ending the command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with _terminated_like_interrupted():
        try:
            try:
                app(args=arguments, prog_name=name)
            finally:
                if sys.stdout is not None:  # as where it was closed before we started
                    sys.stdout.flush()  # or the interpreter would, when nothing is said any more
        except ValueError as error:
            say(f"prototok: {error}")
            sys.exit(2)
        except KeyboardInterrupt:
            say("prototok: interrupted")
            sys.exit(130)
        except (BrokenPipeError, SystemExit) as end:
            before = end.__context__
            if not isinstance(end, BrokenPipeError) and not isinstance(before, BrokenPipeError):
                raise
            # The reader of our output went away, as `| head` does, which Typer ends with 1; nothing
            # is wrong or lost.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(before.code if isinstance(before, SystemExit) else 0)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            say(f"prototok: {error.strerror or error}{where}")
            sys.exit(2)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, where signals can be handled: on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
