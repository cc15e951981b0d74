"""The command line: `prototok …` and `python -m prototok …`.

Exit codes: 0 ok, 2 usage, 3 finished with units that failed, 130 interrupted with work saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prototok.bench.command import bench
from prototok.common.command_line import PREFIX, SHAPE, Device, Dtype, say
from prototok.common.command_line import run as run_app
from prototok.sweep.cli import app as sweep_app

if TYPE_CHECKING:
    from prototok.results.fit_result import FitResult

app = typer.Typer(
    help="One-step text reconstruction from proto-tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.add_typer(sweep_app, name="sweep")

Model = Annotated[str, typer.Option(help="Hub id, folder, tiny-llama or tiny-neox.")]

_TRACE = "Chrome trace file. Default: profile.json on the CPU; on CUDA none, for Nsight."
_EAGER = "On CUDA, steps without a graph: only those show their spans."
_PAGE = "The page; its tables and charts go into a folder of that name beside it."
_FILES = "CSV, LaTeX, SVG, PNG and PDF beside the page."
_MEASURE = "Load the models for paths, robustness and neighbours, first; minutes. Kept in the run."
_SEMANTIC = "Folder or hub id of all-MiniLM-L6-v2, for the semantic distances of Figure 5."


@app.command()
def fit(
    book: Annotated[Path, typer.Argument(help="A plain-text file in UTF-8.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    model: Model = "tiny-llama",
    length: Annotated[int, typer.Option(help="Tokens a chunk.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Fit only this many chunks.")] = None,
    recipe: Annotated[str, typer.Option(help="fast or paper.")] = "fast",
    arrangement: Annotated[str, typer.Option(help="Where e and m stand.")] = "e m*",
    share: Annotated[str | None, typer.Option(help="m or e: one vector for all chunks.")] = None,
    seeds: Annotated[int, typer.Option(help="Initialisations a chunk; the best is shown.")] = 1,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Rows at once.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Cut a book into chunks, fit each, and write vectors and measurements to a folder."""
    from prototok.fitting.fast_fit import fast_fit
    from prototok.model.load import load
    from prototok.results.fit_result import FitInterrupted, require_writable
    from prototok.texts.files import chunks, read_text

    if length < 1:
        raise ValueError(f"length: {length} is not a positive integer")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} is not a positive integer")
    require_writable(out)  # before hours of work, not after them
    text = read_text(book)
    lm = load(model, device, dtype, revision)
    pieces = chunks(lm, text, length, limit)
    family = "its own forward" if lm.body.family != "general" else "the general way, transformers"
    stored = f", dequantised from {lm.dequantised}" if lm.dequantised else ""
    say(f"{model}: {lm.body.family} ({family}), {str(lm.dtype)[6:]} on {lm.device}{stored}")
    try:
        result = fast_fit(
            lm, pieces, share=share, seeds=seeds, arrangement=arrangement, recipe=recipe,
            prefix=None if prefix == "none" else prefix, batch_size=batch_size or "auto",
            progress=True,
        )  # fmt: skip
    except FitInterrupted as stopped:
        if stopped.result is None:
            say("interrupted before the first chunk was fitted; nothing was written")
        else:
            stopped.result.save(out)
            say(f"interrupted; {len(stopped.texts)} of {len(pieces)} chunks are in {out}")
        raise typer.Exit(130) from None
    result.save(out)
    _summarise(result, out)


def _summarise(result: FitResult, out: Path) -> None:
    best = result.best()
    exact, texts = int(best.exact.sum()), best.tokens.texts
    if best.tokens.prefix is not None:
        say(f"in front: {best.tokens.provenance['prefix']}")
    say(
        f"{texts} chunks, {int(best.tokens.lengths.sum())} tokens, {exact} exact, mean accuracy "
        f"{float(best.accuracy.mean()):.3f}, {float(result.seconds.sum()):.1f} s; written to {out}"
    )


@app.command()
def decode(
    folder: Annotated[Path, typer.Argument(help="A folder that `prototok fit` wrote.")],
    model: Annotated[str | None, typer.Option(help="Default: the model in the folder.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Print the text back, one forward pass a chunk, and say on stderr which chunks are exact."""
    import torch

    from prototok.decoding.decode import decode as decode_tokens
    from prototok.model.load import load
    from prototok.results.fit_result import FitResult

    best = FitResult.load(folder).best()
    stored = best.tokens.model
    lm = load(model or stored.name, device, dtype, None if model else stored.revision)
    rows = decode_tokens(lm, best.tokens)
    found = [row[: len(target)] for row, target in zip(rows, best.targets, strict=True)]
    # All ids at once: a chunk may end in the middle of a character.
    print(lm.decode_ids(torch.cat(found)))
    exact = 0
    for i, (ids, target) in enumerate(zip(found, best.targets, strict=True)):
        right = int((ids == target).sum())
        exact += right == len(target)
        verdict = "exact" if right == len(target) else f"{right} of {len(target)} tokens right"
        say(f"chunk {i}: {verdict}")
    say(f"{exact} of {len(found)} chunks are exact")


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
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Find the longest prefix of each text that comes back, exactly and at accuracy 0.99."""
    from prototok.fitting.capacity import GRID
    from prototok.fitting.capacity import capacity as find_capacity
    from prototok.model.load import load
    from prototok.texts.files import chunks, read_text

    if texts < 1:
        raise ValueError(f"texts: {texts} is not a positive integer")
    if longest < GRID[0]:
        raise ValueError(f"longest: {longest} is less than {GRID[0]}, the first of the grid")
    text = read_text(book)
    lm = load(model, device, dtype)
    pieces = chunks(lm, text, longest, texts)
    found = find_capacity(
        lm, pieces, recipe=recipe, restarts=restarts, progress=True,
        prefix=None if prefix == "none" else prefix,
    )  # fmt: skip
    lines = ["text,exact,at_099,ended,steps,seconds"]
    for t in range(len(pieces)):
        lines.append(
            f"{t},{int(found.exact[t])},{int(found.at_099[t])},{int(found.ended[t])},"
            f"{int(found.steps[t])},{float(found.seconds[t]):.2f}"
        )
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


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
    from prototok.bench.profile import Work, step_range
    from prototok.bench.profile import profile as run_profile
    from prototok.model.load import load
    from prototok.model.shapes import load_shape

    if batch < 1:
        raise ValueError(f"batch: {batch} is not a positive integer")
    which = step_range(steps)
    lm = load(model, device, dtype) if shape is None else load_shape(shape, device, dtype)
    if trace is None and lm.device.type != "cuda":
        trace = Path("profile.json")
    work = Work(what, length, batch, backend, eager)
    say(str(work.plan(lm)))
    seconds, table = run_profile(lm, work, which, trace)
    if table:
        print(table)
    say(f"{1e3 * seconds:.3f} ms a step" + (f"; trace in {trace}" if trace else ""))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder of `prototok sweep`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help=_PAGE)] = Path("report.html"),
    files: Annotated[bool, typer.Option(help=_FILES)] = True,
    measure: Annotated[bool, typer.Option("--measure", help=_MEASURE)] = False,
    pairs: Annotated[int | None, typer.Option(help="With --measure: pairs a text.")] = None,
    curve_steps: Annotated[int, typer.Option(help="With --measure: most updates a curve.")] = 5000,
    semantic: Annotated[str | None, typer.Option(help=_SEMANTIC)] = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write a run's tables and figures beside the paper's as one page that opens offline."""
    for name, value in (("pairs", pairs), ("curve_steps", curve_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a positive integer")
    if out.is_dir() or not out.suffix:
        raise ValueError(f"out: {out} is no name of a page, such as report.html")
    from prototok.report.build import build
    from prototok.report.results import read

    results = read(run)
    if measure:
        from prototok.geometry.paths import BezierSettings
        from prototok.report.measure import measure as measure_all

        measure_all(results, device, BezierSettings(max_steps=curve_steps), pairs, say)
    if semantic is not None:
        from prototok.report.measure import measure_semantics

        measure_semantics(results, semantic, device)
    written = build(results, out, files)
    for line in written.skipped:
        say(f"left out: {line}")
    beside = f", {len(written.files)} files in {written.folder}" if written.folder else ""
    say(f"written to {written.page}{beside}")


@app.command()
def env() -> None:
    """Print machine, versions, and which kernels a usual model runs on here."""
    import torch

    from prototok.bench.machine import describe, usual_plan

    for name, value in describe().items():
        print(f"{name}: {value}")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\na Llama of hidden size 768, {usual_plan(dtype)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a ValueError becomes one sentence and exit code 2."""
    run_app(app, "prototok", arguments)


if __name__ == "__main__":
    main()
