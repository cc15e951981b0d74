"""The command line: `prototok …` and `python -m prototok …`.

Exit codes: 0 ok, 2 usage, 3 ended with units that failed or before a full disk, with the others
saved, 130 interrupted (by Ctrl-C or SIGTERM) with work saved.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from prototok.bench.command import bench
from prototok.commands.completion import completion
from prototok.commands.dataset import dataset
from prototok.commands.decode import decode
from prototok.commands.encode import encode
from prototok.commands.env import env
from prototok.commands.export import export
from prototok.commands.fit import fit
from prototok.commands.learn import app as learn_app
from prototok.common.command_line import (
    PREFIX,
    RESUME,
    SHAPE,
    Device,
    Dtype,
    Model,
    front_asked,
    require_positive,
    say,
)
from prototok.common.command_line import run as run_app
from prototok.common.files import try_file
from prototok.common.version import VERSION
from prototok.demo.command import demo
from prototok.sweep.cli import app as sweep_app

# `prototok completion` instead of typer's, which guesses the shell and runs Python at every Tab.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
for command in (fit, dataset, decode, encode, export, bench, demo, env, completion):
    app.command()(command)
app.add_typer(learn_app, name="learn")
app.add_typer(sweep_app, name="sweep")

_CAPACITY_COLUMNS = "text,exact,at_099,ended,steps,seconds"
_VERSION = "Print the version and end."
_TRACE = "Chrome trace file. Default: profile.json on the CPU; on CUDA none, for Nsight."
_EAGER = "On CUDA, steps without a graph: only those show named ranges."
_PAGE = "The page; its tables and charts go into a folder of that name beside it."
_TITLE = "Of the page. Default: the run's name."
_FILES = "CSV, LaTeX, SVG, PNG and PDF beside the page."
_MEASURE = "Load the models for paths, robustness and neighbours, first; minutes. Kept in the run."
_SEMANTIC = "Folder or hub id of all-MiniLM-L6-v2, for the semantic distances of Figure 5."


def _say_version(asked: bool) -> None:
    if asked:
        print(f"prototok {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help=_VERSION)
    ] = False,
) -> None:
    """One-step text reconstruction from proto-tokens."""


@app.command()
def capacity(
    book: Annotated[Path, typer.Argument(help="A plain-text file in UTF-8.")],
    model: Model = "tiny-llama",
    texts: Annotated[int, typer.Option(help="Texts, cut from the book one after another.")] = 8,
    longest: Annotated[int, typer.Option(help="Tokens a text.")] = 128,
    recipe: Annotated[str, typer.Option(help="fast or paper.")] = "fast",
    restarts: Annotated[int, typer.Option(help="Fresh starts after a failure.")] = 1,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A CSV, one line a text.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier CSV.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Find the longest prefix of each text that comes back, exactly and at accuracy 0.99."""
    from prototok.fitting.capacity import GRID
    from prototok.fitting.capacity_file import CapacityFile, measure
    from prototok.fitting.recipe import recipe_of
    from prototok.model.load import load
    from prototok.texts.files import chunks, read_text

    require_positive(texts=texts)
    if longest < GRID[0]:
        raise ValueError(f"longest: {longest} is less than {GRID[0]}, the first of the grid")
    if restarts < 0:
        raise ValueError(f"restarts: {restarts} is negative")
    settings = recipe_of(recipe)
    text = read_text(book)
    if out is None and (resume or overwrite):
        raise ValueError("out: --resume and --overwrite are of a file, and none was named")
    place = None if out is None else CapacityFile(out, resume, overwrite)
    with contextlib.nullcontext() if place is None else place.claimed():
        lm = load(model, device, dtype)
        pieces = chunks(lm, text, longest, texts)
        shown, code = measure(lm, pieces, settings, restarts, front_asked(prefix), place)
    print(shown, end="")
    if code:
        raise typer.Exit(code)


@app.command()
def profile(
    what: Annotated[str, typer.Argument(help="fit or decode.")] = "fit",
    model: Model = "tiny-llama",
    shape: Annotated[str | None, typer.Option(help=SHAPE)] = None,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 32,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 16,
    steps: Annotated[str, typer.Option(help="a:b, after a to warm up.")] = "20:30",
    backend: Annotated[str, typer.Option(help="auto, torch, triton or cpu.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help=_EAGER)] = False,
    trace: Annotated[Path | None, typer.Option(help=_TRACE)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Run steps of a fit, or decodings, under a profiler."""
    from prototok.bench.profile import Work, require_work, step_range
    from prototok.bench.profile import profile as run_profile
    from prototok.model.load import device_of, load
    from prototok.model.shapes import load_shape

    require_positive(batch=batch, length=length)
    which = step_range(steps)
    require_work(what)
    if trace is None and device_of(device).type != "cuda":
        trace = Path("profile.json")
    if trace is not None:
        try_file(trace, "trace", lambda head: b'"schemaVersion"' in head)
    lm = load(model, device, dtype) if shape is None else load_shape(shape, device, dtype)
    work = Work(what, length, batch, backend, eager)
    seconds, table = run_profile(lm, work, which, trace)
    say(str(work.plan(lm)))
    if table:
        print(table)
    say(f"{1e3 * seconds:.3f} ms a step" + (f"; trace in {trace}" if trace else ""))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder of `prototok sweep`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help=_PAGE)] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help=_TITLE)] = None,
    files: Annotated[bool, typer.Option(help=_FILES)] = True,
    measure: Annotated[bool, typer.Option("--measure", help=_MEASURE)] = False,
    pairs: Annotated[int | None, typer.Option(help="With --measure: pairs a text.")] = None,
    curve_steps: Annotated[int, typer.Option(help="With --measure: most updates a curve.")] = 5000,
    semantic: Annotated[str | None, typer.Option(help=_SEMANTIC)] = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write a run's tables and figures beside the paper's as one page that opens offline."""
    require_positive(pairs=pairs, curve_steps=curve_steps)
    if out.is_dir() or not out.suffix:
        raise ValueError(f"out: {out} is no name of a page, such as report.html")
    from prototok.report.build import build, require_place
    from prototok.report.results import read

    require_place(out, out.with_suffix("") if files else None)
    results = read(run)
    if measure:
        from prototok.geometry.paths import BezierSettings
        from prototok.report.measure import measure as measure_all

        measure_all(results, device, BezierSettings(max_steps=curve_steps), pairs, say)
    if semantic is not None:
        from prototok.report.measure import measure_semantics

        measure_semantics(results, semantic, device)
    written = build(results, out, files, title=title)
    if not any(one.fits() for one in results.experiments.values()):
        say(f"no fit of {run} is done yet: prototok sweep run {run}")
    for line in written.skipped:
        say(f"left out: {line}")
    beside = f", {len(written.files)} files in {written.folder}" if written.folder else ""
    say(f"written to {written.page}{beside}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a ValueError becomes one sentence and exit code 2."""
    run_app(app, "prototok", arguments)


if __name__ == "__main__":
    main()
