"""The command line: `prototok …` and `python -m prototok …`.

Exit codes: 0 ok, 2 usage, 3 finished with units that failed, 130 interrupted with work saved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prototok.sweep.cli import app as sweep_app

if TYPE_CHECKING:
    from prototok.fit_result import FitResult

app = typer.Typer(
    help="One-step text reconstruction from proto-tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sweep_app, name="sweep")

Model = Annotated[str, typer.Option(help="Hub id, folder, tiny-llama or tiny-neox.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32, …")]

_BENCH_MODEL = "May be given more than once. Default: both built-in models."
_SHAPE = (
    "A published shape with random weights, for speed alone: pythia-160m, pythia-410m, "
    "pythia-1.4b, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b."
)
_PROFILE = "Profile steps a … b−1 of the first fit, as a:b; docs/profiling.md says how to read it."
_TRACE = "Chrome trace file. Default: profile.json on the CPU; on CUDA none, for Nsight."
_EAGER = "On CUDA, steps without a graph: only those show their spans."
_TEXT = "Where the texts come from. Default: a held-out book in the package."
_VLLM = "An interpreter that has vLLM, to time it as well."
_OUT = "The record; the figure goes beside it."
_PAGE = "The page; its tables and charts go into a folder of that name beside it."
_FILES = "CSV, LaTeX, SVG, PNG and PDF beside the page."
_MEASURE = "Load the models for paths, robustness and neighbours, first; minutes. Kept in the run."
_SEMANTIC = "Folder or hub id of all-MiniLM-L6-v2, for the semantic distances of Figure 5."
_SUMMARY = ("model", "length", "exact", "ratio_batch_1", "ratio_best_batch", "ceiling")


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
    batch_size: Annotated[int | None, typer.Option(help="Rows at once.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Cut a book into chunks, fit each, and write vectors and measurements to a folder."""
    from prototok.data import chunks, read_text
    from prototok.fast_fit import fast_fit
    from prototok.fit_result import FitInterrupted, require_writable
    from prototok.frozen_lm import load

    if length < 1:
        raise ValueError(f"length: {length} is not a positive integer")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} is not a positive integer")
    require_writable(out)  # before hours of work, not after them
    text = read_text(book)
    lm = load(model, device, dtype, revision)
    pieces = chunks(lm, text, length, limit)
    family = "its own forward" if lm.body.family != "general" else "the general way, transformers"
    _say(f"{model}: {lm.body.family} ({family}), {str(lm.dtype)[6:]} on {lm.device}")
    try:
        result = fast_fit(
            lm, pieces, share=share, seeds=seeds, arrangement=arrangement, recipe=recipe,
            batch_size=batch_size or "auto", progress=True,
        )  # fmt: skip
    except FitInterrupted as stopped:
        if stopped.result is None:
            _say("interrupted before the first chunk was fitted; nothing was written")
        else:
            stopped.result.save(out)
            _say(f"interrupted; {len(stopped.texts)} of {len(pieces)} chunks are in {out}")
        raise typer.Exit(130) from None
    result.save(out)
    _summarise(result, out)


def _summarise(result: FitResult, out: Path) -> None:
    best = result.best()
    exact, texts = int(best.exact.sum()), best.tokens.texts
    _say(
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

    from prototok.decode import decode as decode_tokens
    from prototok.fit_result import FitResult
    from prototok.frozen_lm import load

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
        _say(f"chunk {i}: {verdict}")
    _say(f"{exact} of {len(found)} chunks are exact")


@app.command()
def capacity(
    book: Annotated[Path, typer.Argument(help="A plain-text file in UTF-8.")],
    model: Model = "tiny-llama",
    texts: Annotated[int, typer.Option(help="Texts, cut from the book one after another.")] = 8,
    longest: Annotated[int, typer.Option(help="Tokens a text.")] = 128,
    recipe: Annotated[str, typer.Option(help="fast or paper.")] = "fast",
    restarts: Annotated[int, typer.Option(help="Fresh starts after a failure.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A CSV, one line a text.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Find the longest prefix of each text that comes back, exactly and at accuracy 0.99."""
    from prototok.capacity import GRID
    from prototok.capacity import capacity as find_capacity
    from prototok.data import chunks, read_text
    from prototok.frozen_lm import load

    if texts < 1:
        raise ValueError(f"texts: {texts} is not a positive integer")
    if longest < GRID[0]:
        raise ValueError(f"longest: {longest} is less than {GRID[0]}, the first of the grid")
    text = read_text(book)
    lm = load(model, device, dtype)
    pieces = chunks(lm, text, longest, texts)
    found = find_capacity(lm, pieces, recipe=recipe, restarts=restarts, progress=True)
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
def bench(
    model: Annotated[list[str] | None, typer.Option(help=_BENCH_MODEL)] = None,
    shape: Annotated[str | None, typer.Option(help=_SHAPE)] = None,
    lengths: Annotated[str | None, typer.Option(help="Such as 32,64,128.")] = None,
    texts: Annotated[int, typer.Option(help="Texts to fit at each length.")] = 8,
    text: Annotated[Path | None, typer.Option(help=_TEXT)] = None,
    recipe: Annotated[str, typer.Option(help="fast or paper.")] = "fast",
    profile: Annotated[str | None, typer.Option(help=_PROFILE)] = None,
    vllm_python: Annotated[Path | None, typer.Option(help=_VLLM)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help=_OUT)] = Path("bench.json"),
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Fit, verify, and time one forward pass against KV-cached decoding."""
    from prototok.bench import BenchSettings, run_bench, table, write
    from prototok.frozen_lm import BUILT_IN
    from prototok.profile import step_range

    if shape is not None and model:
        raise ValueError("shape: give a model or a shape, not both")
    if texts < 1:
        raise ValueError(f"texts: {texts} is not a positive integer")
    settings = BenchSettings(
        tuple(model) if model else BUILT_IN, shape, _lengths(lengths), texts, text, recipe,
        device, dtype, None if profile is None else step_range(profile), vllm_python,
    )  # fmt: skip
    record = run_bench(settings, say=_say)
    write(record, out)
    print(table(record))
    print(f"\n{record['seconds']:.0f} s; written to {out} and {out.with_suffix('.svg')}")
    print(json.dumps([{key: case[key] for key in _SUMMARY} for case in record["cases"]]))


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"lengths: {text!r} is not a list such as 32,64,128") from None


@app.command()
def profile(
    what: Annotated[str, typer.Argument(help="fit or decode.")] = "fit",
    model: Model = "tiny-llama",
    shape: Annotated[str | None, typer.Option(help=_SHAPE)] = None,
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
    from prototok.frozen_lm import load
    from prototok.profile import Work, step_range
    from prototok.profile import profile as run_profile
    from prototok.shapes import load_shape

    if batch < 1:
        raise ValueError(f"batch: {batch} is not a positive integer")
    which = step_range(steps)
    lm = load(model, device, dtype) if shape is None else load_shape(shape, device, dtype)
    if trace is None and lm.device.type != "cuda":
        trace = Path("profile.json")
    work = Work(what, length, batch, backend, eager)
    _say(str(work.plan(lm)))
    seconds, table = run_profile(lm, work, which, trace)
    if table:
        print(table)
    _say(f"{1e3 * seconds:.3f} ms a step" + (f"; trace in {trace}" if trace else ""))


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

        measure_all(results, device, BezierSettings(max_steps=curve_steps), pairs, _say)
    if semantic is not None:
        from prototok.report.measure import measure_semantics

        measure_semantics(results, semantic, device)
    written = build(results, out, files)
    for line in written.skipped:
        _say(f"left out: {line}")
    beside = f", {len(written.files)} files in {written.folder}" if written.folder else ""
    _say(f"written to {written.page}{beside}")


@app.command()
def env() -> None:
    """Print machine, versions, and which kernels a usual model runs on here."""
    import torch

    from prototok.machine import describe, usual_plan

    for name, value in describe().items():
        print(f"{name}: {value}")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\na Llama of hidden size 768, {usual_plan(dtype)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a ValueError becomes one sentence and exit code 2."""
    try:
        app(args=arguments, prog_name="prototok")
    except ValueError as error:
        _say(f"prototok: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("prototok: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; nothing is wrong, nothing is lost.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
