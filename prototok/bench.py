"""What one forward pass is worth: fit, verify, and time it against KV-cached decoding.

`python -m prototok.bench` measures the two built-in models and needs neither a network nor
arguments; `--help` lists what else it can measure. Letters: N tokens of a text.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prototok import machine
from prototok.allocator import keep_freed_memory
from prototok.arrangement import Arrangement
from prototok.baselines import CACHES, Engine, Generate
from prototok.data import chunks, read_text
from prototok.decode import decode_vectors, require_length
from prototok.engine.inputs import OneForward
from prototok.engine.recipe import Recipe, recipe_of
from prototok.engine.rows import make_units
from prototok.engine.run import run
from prototok.engine.runner import burst_of
from prototok.fast_fit import FitEvent, fast_fit
from prototok.frozen_lm import BUILT_IN, FrozenLM, load
from prototok.profile import Capture, ProfiledSteps
from prototok.report.svg import Bar, log_bars
from prototok.shapes import load_shape

BUILT_IN_LENGTHS = (8, 16)  # what the built-in models hold
OTHER_LENGTHS = (32, 64, 128)
_BATCHES = (1, 4, 16, 64)
_ONE = "one forward"
_ENGINE = "engine static-KV"


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; see `python -m prototok.bench --help`."""

    models: tuple[str, ...] = BUILT_IN
    shape: str | None = None
    lengths: tuple[int, ...] | None = None
    texts: int = 8
    text: Path | None = None
    recipe: str | Recipe = "fast"
    device: str = "auto"
    dtype: str = "auto"
    profile: tuple[int, int] | None = None  # steps a … b−1 of the first fit


@dataclass(frozen=True)
class Timing:
    """One way of producing N tokens: median and quartiles of seconds a call, by batch size.

    bandwidth_share is, for our own decoder, the bytes of weights and cache that it has to read,
    over what this machine's copy moves in that time; weights that fit into a cache can exceed 1.
    """

    method: str
    dtype: str
    batch: int
    seconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    bandwidth_share: float | None = None


@dataclass(frozen=True)
class Case:
    """One model at one length."""

    model: str
    length: int
    dtype: str
    texts: int
    exact: int | None  # None where the weights are random and nothing is fitted to the end
    mean_accuracy: float | None
    fit_seconds_per_text: float | None
    fit_steps_median: float | None
    step_seconds: float | None  # one step of the whole batch, for random weights
    timings: tuple[Timing, ...]
    ratio_batch_1: float  # one forward over the strongest autoregressive way, both at batch 1
    ratio_best_batch: float  # each way at its own best batch
    ratio_dynamic_batch_1: float  # the paper's comparison: generate as it comes
    ceiling: float
    break_even_decodes: float | None


def run_bench(settings: BenchSettings, say: Callable[[str], None] = lambda line: None) -> dict:
    """Measure everything in `settings` and return the record that bench.json holds."""
    keep_freed_memory()
    started = time.perf_counter()
    cases: list[Case] = []
    peaks: dict[str, dict[str, float]] = {}
    for name, lm in _models(settings):
        default = BUILT_IN_LENGTHS if name in BUILT_IN else OTHER_LENGTHS
        lengths = settings.lengths or default
        dtype = _name(lm.dtype)
        if dtype not in peaks:
            peaks[dtype] = {
                "flops_per_second": machine.matmul_rate(lm.device, lm.dtype),
                "bytes_per_second": machine.copy_rate(lm.device),
            }
        for length in lengths:
            require_length(length, lm, Arrangement.parse("e m*"))
        for length in lengths:
            say(f"{name}, N = {length}: fitting")
            profiled = _profiled(lm, settings) if not cases else None
            cases.append(_measure(lm, name, length, settings, peaks[dtype], say, profiled))
            if profiled is not None:
                profiled.close()
                say(profiled.capture.report())
    return {
        "command": "python -m prototok.bench",
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "recipe": dataclasses.asdict(recipe_of(settings.recipe)),
        "measured_peaks": peaks,
        "cases": [dataclasses.asdict(case) for case in cases],
        "seconds": time.perf_counter() - started,
    }


def _models(settings: BenchSettings) -> list[tuple[str, FrozenLM]]:
    if settings.shape is None:
        return [(name, load(name, settings.device, settings.dtype)) for name in settings.models]
    lm = load_shape(settings.shape, settings.device, settings.dtype)
    return [(f"{settings.shape} (random weights)", lm)]


def _measure(
    lm: FrozenLM, name: str, length: int, settings: BenchSettings, peak: dict[str, float],
    say: Callable[[str], None], look: Callable[[FitEvent], None] | None = None,
) -> Case:  # fmt: skip
    arrangement = Arrangement.parse("e m*")
    exact = accuracy = per_text = steps = step_seconds = None
    if settings.shape is not None:
        generator = torch.Generator().manual_seed(0)
        targets = list(torch.randint(lm.vocab_size, (settings.texts, length), generator=generator))
        vectors = torch.randn(1, 2, lm.hidden_size, generator=generator)
        step_seconds = _step_seconds(lm, targets, arrangement, look)
    else:
        pieces = _texts(lm, settings, length)
        clock = time.perf_counter()
        fit = fast_fit(lm, pieces, recipe=settings.recipe, progress=None, callback=look)
        per_text = (time.perf_counter() - clock) / len(pieces)
        exact, accuracy = int(fit.exact.sum()), float(fit.accuracy.mean())
        solved = fit.steps[fit.exact]
        steps = float(solved.float().median()) if len(solved) else None
        row = int(fit.exact.flatten().int().argmax())
        vectors = fit.tokens.vectors(row)[None]
        decoded = decode_vectors(lm, vectors, arrangement, length).ids[0]
        if exact and not torch.equal(decoded, fit.targets[row]):
            raise RuntimeError(f"{name}: a fit that was exact no longer decodes to its text")
    say(f"{name}, N = {length}: timing one forward against generate")
    timings = _time_all(lm, vectors, arrangement, length, peak["bytes_per_second"])
    one = [t for t in timings if t.method == _ONE]
    others = [t for t in timings if t.method != _ONE]

    def fastest(found: Sequence[Timing], batch: int | None = None) -> Timing:
        return max(
            (t for t in found if batch in (None, t.batch)), key=lambda t: t.tokens_per_second
        )

    dynamic = [t for t in others if "dynamic" in t.method]
    gain = fastest(others, 1).seconds - fastest(one, 1).seconds
    return Case(
        model=name,
        length=length,
        dtype=_name(lm.dtype),
        texts=settings.texts,
        exact=exact,
        mean_accuracy=accuracy,
        fit_seconds_per_text=per_text,
        fit_steps_median=steps,
        step_seconds=step_seconds,
        timings=tuple(timings),
        ratio_batch_1=fastest(one, 1).tokens_per_second / fastest(others, 1).tokens_per_second,
        ratio_best_batch=fastest(one).tokens_per_second / fastest(others).tokens_per_second,
        ratio_dynamic_batch_1=fastest(one, 1).tokens_per_second
        / fastest(dynamic, 1).tokens_per_second,
        ceiling=_ceiling(length, lm.dtype, peak),
        break_even_decodes=per_text / gain if per_text is not None and gain > 0 else None,
    )


def _texts(lm: FrozenLM, settings: BenchSettings, length: int) -> list[list[int]]:
    path = settings.text or Path(__file__).parent / "models" / BUILT_IN[0] / "held_out.txt"
    pieces = chunks(lm, read_text(path), length, settings.texts)
    if len(pieces) < settings.texts or len(pieces[-1]) < length:
        raise ValueError(f"text: {path} has fewer than {settings.texts} pieces of {length} tokens")
    return pieces


def _time_all(
    lm: FrozenLM, vectors: Tensor, arrangement: Arrangement, length: int, bytes_per_second: float
) -> list[Timing]:
    """All ways at all batch sizes; at each size the ways take turns, so that drift hits all."""
    dtypes = [lm.dtype]
    if lm.device.type == "cpu" and lm.dtype != torch.float32:
        dtypes.append(torch.float32)  # at batch 1 the wider dtype can be the faster baseline
    generate = {dtype: Generate(lm, dtype) for dtype in dtypes}
    own = lm.body.family != "general"
    engine = {dtype: Engine(lm, dtype) for dtype in dtypes if own}
    timings = []
    for batch in _BATCHES:
        rows = vectors.expand(batch, -1, -1)
        forward = functools.partial(decode_vectors, lm, rows, arrangement, length)
        ways: dict[tuple[str, torch.dtype], Callable[[], object]] = {(_ONE, lm.dtype): forward}
        for dtype, baseline in generate.items():
            for cache in CACHES:
                ways[f"generate, {cache} cache", dtype] = baseline.call(length, batch, cache)
        for dtype, decoder in engine.items():
            ways[_ENGINE, dtype] = decoder.call(length, batch)
        seconds: dict[tuple[str, torch.dtype], list[float]] = {way: [] for way in ways}
        for turn in range(4):
            for way, call in ways.items():
                spent = machine.once(call, lm.device)
                if turn:  # the first warms up
                    seconds[way].append(spent)
        # A way that takes milliseconds needs more readings than one that takes seconds.
        for way in [(_ONE, lm.dtype)] + [(_ENGINE, dtype) for dtype in engine]:
            seconds[way] += machine.timed(ways[way], lm.device, 0.1)
        for (method, dtype), readings in seconds.items():
            low, middle, high = statistics.quantiles(readings, n=4)
            share = None
            if method == _ENGINE:
                share = engine[dtype].bytes_read(length, batch) / middle / bytes_per_second
            timings.append(
                Timing(
                    method, _name(dtype), batch, middle, (low, high), batch * length / middle, share
                )
            )
    return timings


def _profiled(lm: FrozenLM, settings: BenchSettings) -> ProfiledSteps | None:
    """What profiles the steps that the settings name, if they do."""
    if settings.profile is None:
        return None
    return ProfiledSteps(Capture(lm.device, None), settings.profile, burst_of(lm.device))


def _step_seconds(
    lm: FrozenLM, targets: list[Tensor], arrangement: Arrangement,
    look: Callable[[FitEvent], None] | None,
) -> float:  # fmt: skip
    """Median seconds of a fit step of all texts together."""
    marks: list[float] = []

    def mark(event: FitEvent) -> None:
        marks.append(time.perf_counter())
        if look is not None:
            look(event)

    burst = burst_of(lm.device)
    recipe = dataclasses.replace(recipe_of("paper"), max_steps=6 * burst)
    units = make_units(targets, [0], None, None)
    for _ in run(
        lm,
        units,
        OneForward(arrangement),
        recipe,
        len(targets),
        "auto",
        lambda finished: True,
        mark,
    ):
        pass
    return statistics.median(b - a for a, b in itertools.pairwise(marks)) / burst


def _ceiling(length: int, dtype: torch.dtype, peak: dict[str, float]) -> float:
    """Largest ratio two efficient implementations can show at batch 1.

    A decoding step reads each weight once, itemsize bytes, and a forward over N positions spends
    2 N FLOPs on it; so the ratio is at most N, and at most FLOP/s over weights read a second / 2.
    """
    return min(length, peak["flops_per_second"] / 2 / (peak["bytes_per_second"] / dtype.itemsize))


def figure(record: dict) -> str:
    """Tokens/s at batch 1 of every way, by model and length, as an SVG document."""
    bars = []
    for case in record["cases"]:
        group = f"{case['model']}, N = {case['length']}"
        for t in case["timings"]:
            if t["batch"] == 1:
                label = t["method"] + ("" if t["dtype"] == case["dtype"] else f" ({t['dtype']})")
                rate = t["tokens_per_second"]
                bars.append(Bar(group, label, rate, f"{rate:,.0f}"))
    return log_bars("One forward against autoregressive decoding", "tokens/s at batch 1", bars)


def table(record: dict) -> str:
    """The record as the table that is printed: one line a model and length."""
    head = (
        "model", "N", "exact", "fit s/text", "one fwd tok/s", "best AR tok/s (how)", "ratio",
        "vs dynamic", "best batch", "ceiling", "break-even",
    )  # fmt: skip
    rows = [head]
    for c in record["cases"]:
        at_1 = [t for t in c["timings"] if t["batch"] == 1]
        one = next(t for t in at_1 if t["method"] == _ONE)
        best = max((t for t in at_1 if t is not one), key=lambda t: t["tokens_per_second"])
        how = best["method"].removeprefix("generate, ").removesuffix(" cache")
        fit = c["fit_seconds_per_text"]
        rows.append(
            (
                c["model"],
                str(c["length"]),
                "–" if c["exact"] is None else f"{c['exact']}/{c['texts']}",
                f"{c['step_seconds']:.3g} a step" if fit is None else f"{fit:.2f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{best['tokens_per_second']:,.0f} ({how}, {best['dtype']})",
                f"{c['ratio_batch_1']:.1f}×",
                f"{c['ratio_dynamic_batch_1']:.1f}×",
                f"{c['ratio_best_batch']:.1f}×",
                f"{c['ceiling']:.0f}×",
                "–" if c["break_even_decodes"] is None else f"{c['break_even_decodes']:,.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    m = record["machine"]
    device = m["cuda device"] if m["cuda device"] != "none" else m["processor"]
    dtypes = ", ".join(sorted({c["dtype"] for c in record["cases"]}))
    notes = [
        f"{device}, {m['threads']} threads, torch {m['torch']}, "
        f"transformers {m['transformers']}, {dtypes}",
        "exact: texts that come back whole when decoded alone, in the model's dtype and float32.",
        "ratio: batch 1, against the strongest autoregressive way here. vs dynamic: against",
        "generate with its default cache, the paper's comparison. engine static-KV: prototok's own",
        "decoder. best batch: each way at its best of " + ", ".join(map(str, _BATCHES)) + ".",
        "ceiling: the most two efficient implementations can differ at batch 1 on this machine,",
        "from its matrix and copy rates. break-even: decodes after which the fit has paid off.",
    ]  # fmt: skip
    return "\n".join([*lines, "", *notes])


def write(record: dict, out: Path) -> None:
    """bench.json at `out` and the figure beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".svg").write_text(figure(record))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    from prototok.cli import main

    main(["bench", *sys.argv[1:]])
