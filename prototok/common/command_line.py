"""What the commands have in common: options, lines on stderr, and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32, …")]
PREFIX = "Text in front of e in every row, not fitted; none, or auto to leave it to the recipe."
SHAPE = (
    "A published shape with random weights, for speed alone: pythia-160m, pythia-410m, "
    "pythia-1.4b, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b."
)


def say(line: str) -> None:
    """Print a line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def run(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command line called `name`; a ValueError becomes one sentence and exit code 2."""
    try:
        app(args=arguments, prog_name=name)
    except ValueError as error:
        say(f"prototok: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("prototok: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; nothing is wrong, nothing is lost.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
