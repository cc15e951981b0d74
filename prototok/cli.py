"""The command line: `prototok …` and `python -m prototok …`.

Exit codes: 0 ok, 2 usage, 3 ended with units that failed or before a full disk, with the others
saved, 130 interrupted (by Ctrl-C or SIGTERM) with work saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prototok.bench.command import bench
from prototok.common.command_line import PREFIX, SHAPE, Device, Dtype, require_positive, say
from prototok.common.command_line import run as run_app
from prototok.common.files import try_file, write_text
from prototok.sweep.cli import app as sweep_app

if TYPE_CHECKING:
    from prototok.fitting.recipe import Recipe
    from prototok.model.frozen_lm import FrozenLM
    from prototok.results.arrangement import Arrangement
    from prototok.results.fit_folder import FitFolder
    from prototok.results.fit_result import FitResult
    from prototok.results.proto_tokens import ProtoTokens

app = typer.Typer(
    help="One-step text reconstruction from proto-tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.add_typer(sweep_app, name="sweep")

Model = Annotated[str, typer.Option(help="Hub id, folder, tiny-llama or tiny-neox.")]

_TEXT = "text differs"  # provenance: where the book differs from its tokens; empty: nowhere
_DECODED = "A new file for the text, in UTF-8 and exact; nothing is added and nothing is printed."
_OVERWRITE = "Replace an earlier fit in the folder; other files in it stay."
_RESUME = "Go on where the same command with this book and these settings was stopped."
_TRACE = "Chrome trace file. Default: profile.json on the CPU; on CUDA none, for Nsight."
_EAGER = "On CUDA, steps without a graph: only those show named ranges."
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_OVERWRITE)] = False,
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME)] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Cut a book into chunks, fit each, and write vectors and measurements to a folder."""
    from prototok.texts.files import read_text

    # All that can be told without a model is told before one is loaded, the quickest first.
    require_positive(length=length, limit=limit, seeds=seeds, batch_size=batch_size)
    text = read_text(book)
    from prototok.common.arguments import seed_list
    from prototok.fitting.fast_fit import require_share
    from prototok.fitting.recipe import recipe_of
    from prototok.results.arrangement import Arrangement
    from prototok.results.fit_folder import FitFolder

    layout, settings = Arrangement.parse(arrangement), recipe_of(recipe)
    require_share(share, layout)
    rows = batch_size or "auto"
    front = None if prefix == "none" else prefix
    request = _Fit(length, limit, settings, layout, share, seed_list(seeds), front, rows)
    folder = FitFolder(out, resume, overwrite)
    with folder.claimed():
        from prototok.model.load import load

        lm = load(model, device, dtype, revision)
        _fit_to_folder(lm, text, folder, request)


@dataclass(frozen=True)
class _Fit:
    """What `prototok fit` was asked for."""

    length: int
    limit: int | None
    recipe: Recipe
    arrangement: Arrangement
    share: str | None
    seeds: list[int]
    prefix: str | None
    batch_size: int | str


def _fit_to_folder(lm: FrozenLM, text: str, folder: FitFolder, asked: _Fit) -> None:
    """Fit the chunks that the folder has not yet, keep each as it ends, and say what came of it."""
    from prototok.fitting.fast_fit import fast_fit
    from prototok.fitting.front import front_of
    from prototok.results.fit_folder import plan_of
    from prototok.results.fit_result import FitInterrupted
    from prototok.texts.files import chunks, text_difference

    pieces = chunks(lm, text, asked.length, asked.limit)
    where = f"{str(lm.dtype)[6:]} on {lm.device}"
    stored = f", dequantised from {lm.dequantised}" if lm.dequantised else ""
    say(f"{lm.identity.name}: {lm.body.family} ({lm.body.reason}), {where}{stored}")
    recipe = json.dumps(dataclasses.asdict(asked.recipe))
    behind, in_front = front_of(lm, asked.prefix, asked.recipe)
    say(f"in front: {in_front}")
    plan = plan_of(behind, pieces, asked.arrangement.name, asked.share, asked.seeds, recipe)
    floats = len(pieces) * len(asked.seeds) * asked.arrangement.slots * lm.hidden_size
    done = folder.begin(plan, 2 * 4 * floats)
    left = sorted(set(range(len(pieces))) - set(done))
    if done:
        say(f"{len(done)} of {len(pieces)} chunks are done already")
    differs = text_difference(lm, text, pieces)

    def labelled(result: FitResult) -> FitResult:
        """Have the vectors say whether exact tokens give the exact text."""
        origin = result.tokens.provenance | {_TEXT: differs or ""}
        return dataclasses.replace(
            result, tokens=dataclasses.replace(result.tokens, provenance=origin)
        )

    whole = None
    try:
        if left:
            result = fast_fit(
                lm, [pieces[i] for i in left], share=asked.share, seeds=asked.seeds,
                arrangement=asked.arrangement.name, recipe=asked.recipe, prefix=asked.prefix,
                batch_size=asked.batch_size, progress=True,
                on_text=lambda i, result: folder.commit(left[i], labelled(result)),
            )  # fmt: skip
            whole = None if asked.share is None else labelled(result)
    except FitInterrupted:
        kept = folder.interrupt()
        if not kept:
            say("interrupted before the first chunk was fitted; nothing was written")
        else:
            say(
                f"interrupted; {kept} of {len(pieces)} chunks are in {folder.path}, and --resume "
                "goes on from there"
            )
        raise typer.Exit(130) from None
    except OSError as error:
        say(
            f"prototok: out: {folder.path} cannot be written any more ({error.strerror or error}); "
            f"{len(folder.done())} of {len(pieces)} chunks are in it, and --resume goes on from "
            "there"
        )
        raise typer.Exit(3) from None
    _summarise(folder.finish(whole), folder)


def _summarise(result: FitResult, folder: FitFolder) -> None:
    best = result.best()
    exact, texts = int(best.exact.sum()), best.tokens.texts
    say(
        f"{texts} chunks, {int(best.tokens.lengths.sum())} tokens, {exact} exact, mean accuracy "
        f"{float(best.accuracy.mean()):.3f}, {float(result.seconds.sum()):.1f} s; written to "
        f"{folder.path}"
    )
    say(_exactness(exact, texts, best.tokens))


def _exactness(exact: int, texts: int, tokens: ProtoTokens) -> str:
    """Tell exact tokens from exact text: a tokenizer may not give back what it read."""
    differs = tokens.provenance.get(_TEXT)
    if differs is None:
        text = "not known"  # fitted from Python, or by an earlier version
    elif differs:
        text = f"no, {differs}"
    else:
        text = "yes" if exact == texts else "no, tokens are wrong"
    return f"tokens exact: {exact} of {texts} chunks; text exact: {text}"


@app.command()
def decode(
    folder: Annotated[Path, typer.Argument(help="A folder that `prototok fit` wrote.")],
    model: Annotated[str | None, typer.Option(help="Default: the model in the folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=_DECODED)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Print the text back, one forward pass a chunk, and say on stderr which chunks are exact."""
    import torch

    from prototok.decoding.decode import decode as decode_tokens
    from prototok.model.load import load
    from prototok.results.fit_result import FitResult

    best = FitResult.load(folder).best()
    if out is not None:
        try_file(out, "out", lambda head: not head)
    stored = best.tokens.model
    lm = load(model or stored.name, device, dtype, None if model else stored.revision)
    best.tokens.require_tokenizer(lm)
    rows = decode_tokens(lm, best.tokens)
    found = [row[: len(target)] for row, target in zip(rows, best.targets, strict=True)]
    # All ids at once: a chunk may end in the middle of a character.
    text = lm.decode_ids(torch.cat(found))
    if out is None:
        _print_text(text)
    else:
        write_text(out, text)
    exact = 0
    for i, (ids, target) in enumerate(zip(found, best.targets, strict=True)):
        right = int((ids == target).sum())
        exact += right == len(target)
        verdict = "exact" if right == len(target) else f"{right} of {len(target)} tokens right"
        say(f"chunk {i}: {verdict}")
    say(f"{exact} of {len(found)} chunks are exact")
    say(_exactness(exact, len(found), best.tokens))


def _print_text(text: str) -> None:
    """Print a text, and say on stderr what the terminal cannot show of it."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = text.encode(encoding, errors="replace").decode(encoding)
    print(shown)
    if shown != text:
        say(f"{encoding} has not all of these characters; --out writes them as they are")


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
    resume: Annotated[bool, typer.Option("--resume", help=_RESUME)] = False,
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
        front = None if prefix == "none" else prefix
        shown, code = measure(
            lm, chunks(lm, text, longest, texts), settings, restarts, front, place
        )
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
