"""What one forward pass is worth: fit, verify, and time it against KV-cached decoding.

`python -m prototok.bench` measures the two built-in models and needs neither a network nor
arguments; `--help` lists what else it can measure. Letters: N tokens of a text.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prototok import autoregressive
from prototok.bench import machine
from prototok.bench.profile import Capture, ProfiledSteps
from prototok.bench.timing import (
    ONE,
    Peak,
    Timing,
    ceiling,
    require_equal_tokens,
    time_all,
)
from prototok.common.allocator import keep_freed_memory
from prototok.decoding.decode import decode_ids, require_length
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.run import run
from prototok.fitting.engine.setup import Setup
from prototok.fitting.fast_fit import FitEvent, fast_fit
from prototok.fitting.learned.optimizer import LearnedOptimizer
from prototok.fitting.recipe import LEARNED, Recipe, recipe_of
from prototok.fitting.shipped import shipped
from prototok.model.frozen_lm import FrozenLM
from prototok.model.load import BUILT_IN, load, path_of
from prototok.model.shapes import load_shape
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.texts.files import chunks, read_text

BUILT_IN_LENGTHS = (8, 16)  # what the built-in models hold
BUILT_IN_AUTOREGRESSIVE_LENGTHS = (2, 3, 4)  # and what one [mem] vector in front of them does
OTHER_LENGTHS = (32, 64, 128)
# The first three cosines of the fast recipe; the built-in models need few more.
_MOST_STEPS = 2100


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
    vllm_python: Path | None = None  # an interpreter that has vLLM


@dataclass(frozen=True)
class LearnedFit:
    """The same texts, fitted by the optimiser that comes with a built-in model."""

    exact: int
    seconds_per_text: float
    steps_median: float | None  # of the exact


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
    learned: LearnedFit | None
    step_seconds: float | None  # one step of the whole batch, for random weights
    timings: tuple[Timing, ...]
    ratio_batch_1: float  # one forward over the strongest autoregressive way, both at batch 1
    ratio_best_batch: float  # each way at its own best batch
    ratio_dynamic_batch_1: float  # the paper's comparison: generate as it comes
    ceiling: float
    break_even_decodes: float | None  # at batch 1, against the strongest way


@dataclass(frozen=True)
class Longest:
    """Figure 3 of the paper, for one model and source: each mode at its own longest length.

    A text's longest length is the largest of the grid up to which it comes back whole, decoded in
    one forward or generated from one [mem] vector, alone; 0 where there is none. `*_length` is that
    of the median text (the lower one of two), and what is timed.
    """

    model: str
    source: str
    one_forward: tuple[int, ...]  # by text
    autoregressive: tuple[int, ...]
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    one_forward_length: int
    autoregressive_length: int
    one_forward_timing: Timing | None  # at batch 1
    autoregressive_timing: Timing | None  # the strongest way at batch 1
    autoregressive_fit_seconds_per_text: float
    ratio_batch_1: float | None
    ratio_best_batch: float | None


def run_bench(settings: BenchSettings, say: Callable[[str], None] = lambda line: None) -> dict:
    """Measure everything in `settings` and return the record that bench.json holds.

    Raises:
        ValueError: a setting that cannot be met.
        RuntimeError: a fit or a baseline does not give the tokens it should; nothing is timed then.
    """
    keep_freed_memory()
    started = time.perf_counter()
    cases: list[Case] = []
    longest: list[Longest] = []
    peaks: dict[str, Peak] = {}
    for name, lm in _models(settings):
        default = BUILT_IN_LENGTHS if name in BUILT_IN else OTHER_LENGTHS
        lengths = settings.lengths or default
        dtype = _name(lm.dtype)
        if dtype not in peaks:
            peaks[dtype] = Peak.measured(lm.device, lm.dtype)
        for length in lengths:
            require_length(length, lm, Arrangement.parse("e m*"))
        require_equal_tokens(lm, max(lengths))
        mine: list[Case] = []
        exact: dict[int, list[bool]] = {}
        for length in lengths:
            say(f"{name}, N = {length}: fitting")
            profiled = _profiled(lm, settings) if not cases else None
            case, exact[length] = _measure(lm, name, length, settings, peaks[dtype], profiled)
            mine.append(case)
            cases.append(case)
            if profiled is not None:
                profiled.close()
                say(profiled.capture.report())
        if settings.shape is None:
            short = name in BUILT_IN and settings.lengths is None
            grid = BUILT_IN_AUTOREGRESSIVE_LENGTHS if short else lengths
            say(f"{name}: fitting one [mem] vector a text")
            longest.append(_longest(lm, name, settings, exact, grid, mine, peaks[dtype]))
    return {
        "command": "python -m prototok.bench",
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "recipe": dataclasses.asdict(_recipe(settings)),
        "measured_peaks": {dtype: dataclasses.asdict(peak) for dtype, peak in peaks.items()},
        "cases": [dataclasses.asdict(case) for case in cases],
        "longest": [dataclasses.asdict(one) for one in longest],
        "seconds": time.perf_counter() - started,
    }


def _recipe(settings: BenchSettings) -> Recipe:
    """Return the recipe; the default run, which somebody waits for, cuts it short."""
    return _cut_short(recipe_of(settings.recipe), settings)


def _cut_short(recipe: Recipe, settings: BenchSettings) -> Recipe:
    if settings == BenchSettings():
        return dataclasses.replace(recipe, max_steps=min(recipe.max_steps, _MOST_STEPS))
    return recipe


def _models(settings: BenchSettings) -> list[tuple[str, FrozenLM]]:
    if settings.shape is None:
        return [
            (
                Path(name).name if Path(name).is_dir() else name,
                load(name, settings.device, settings.dtype),
            )
            for name in settings.models
        ]
    lm = load_shape(settings.shape, settings.device, settings.dtype)
    return [(f"{settings.shape} (random weights)", lm)]


def _measure(
    lm: FrozenLM, name: str, length: int, settings: BenchSettings, peak: Peak,
    look: Callable[[FitEvent], None] | None = None,
) -> tuple[Case, list[bool]]:  # fmt: skip
    """Measure one model at one length; say as well which of the texts are exact."""
    arrangement = Arrangement.parse("e m*")
    exact = accuracy = per_text = steps = learned = step_seconds = None
    which: list[bool] = []
    front = lm
    if settings.shape is not None:
        generator = torch.Generator().manual_seed(0)
        targets = list(
            torch.randint(
                lm.vocab_size, (settings.texts, length), generator=generator, device="cpu"
            )
        )
        vectors = torch.randn(
            1, 2, lm.hidden_size, generator=generator, dtype=torch.float32, device="cpu"
        )
        step_seconds = _step_seconds(lm, targets, arrangement, look)
    else:
        pieces = _texts(lm, settings, length)
        fit, per_text = _timed_fit(lm, pieces, _recipe(settings), look)
        which = fit.exact[:, 0].tolist()
        exact, accuracy, steps = sum(which), float(fit.accuracy.mean()), _median_steps(fit)
        if settings.recipe == "fast" and shipped(LearnedOptimizer, lm) is not None:
            found, seconds = _timed_fit(lm, pieces, _cut_short(LEARNED, settings))
            learned = LearnedFit(int(found.exact.sum()), seconds, _median_steps(found))
        row = int(fit.exact.flatten().int().argmax())
        vectors = fit.tokens.vectors(row)[None]
        front = lm.behind(fit.tokens.prefix)
        decoded = decode_ids(front, vectors, arrangement, length, "auto")[0]
        if exact and not torch.equal(decoded, fit.targets[row]):
            raise RuntimeError(f"{name}: a fit that was exact no longer decodes to its text")
    timings = time_all(front, vectors, length, peak, settings.vllm_python)
    one = [t for t in timings if t.method == ONE]
    others = [t for t in timings if t.method != ONE]
    dynamic = [t for t in others if "dynamic" in t.method]
    gain = _fastest(others, 1).seconds - _fastest(one, 1).seconds
    case = Case(
        model=name,
        length=length,
        dtype=_name(lm.dtype),
        texts=settings.texts,
        exact=exact,
        mean_accuracy=accuracy,
        fit_seconds_per_text=per_text,
        fit_steps_median=steps,
        learned=learned,
        step_seconds=step_seconds,
        timings=tuple(timings),
        ratio_batch_1=_ratio(_fastest(one, 1), _fastest(others, 1)),
        ratio_best_batch=_ratio(_fastest(one), _fastest(others)),
        ratio_dynamic_batch_1=_ratio(_fastest(one, 1), _fastest(dynamic, 1)),
        ceiling=ceiling(length, lm.dtype, peak),
        break_even_decodes=per_text / gain if per_text is not None and gain > 0 else None,
    )
    return case, which


def _timed_fit(
    lm: FrozenLM, pieces: list[list[int]], recipe: Recipe,
    look: Callable[[FitEvent], None] | None = None,
) -> tuple[FitResult, float]:  # fmt: skip
    """Fit the pieces; return the seconds of one as well."""
    clock = time.perf_counter()
    fit = fast_fit(lm, pieces, recipe=recipe, progress=None, callback=look)
    return fit, (time.perf_counter() - clock) / len(pieces)


def _median_steps(fit: FitResult) -> float | None:
    solved = fit.steps[fit.exact]
    return float(solved.float().median()) if len(solved) else None


def _fastest(timings: Sequence[Timing], batch: int | None = None) -> Timing:
    found = [t for t in timings if batch in (None, t.batch)]
    return max(found, key=lambda t: t.tokens_per_second)


def _ratio(one: Timing, other: Timing) -> float:
    return one.tokens_per_second / other.tokens_per_second


def _longest(
    lm: FrozenLM, name: str, settings: BenchSettings, exact: dict[int, list[bool]],
    grid: Sequence[int], cases: Sequence[Case], peak: Peak,
) -> Longest:  # fmt: skip
    """Compare each mode at its own longest length; `exact` says what one forward gave back."""
    clock = time.perf_counter()
    generated: dict[int, list[bool]] = {}
    for length in sorted(grid):
        pieces = _texts(lm, settings, length)
        fit = autoregressive.fit(lm, pieces, 1, recipe=_recipe(settings), progress=None)
        generated[length] = fit.exact[:, 0].tolist()
        if sum(generated[length]) * 2 < settings.texts:
            break
    spent = time.perf_counter() - clock
    one_forward, one_by_one = (_by_text(found, settings.texts) for found in (exact, generated))
    ours, theirs = (statistics.median_low(found) for found in (one_forward, one_by_one))
    timings = {case.length: list(case.timings) for case in cases}
    if theirs and theirs not in timings:
        timings[theirs] = time_all(lm, None, theirs, peak, settings.vllm_python)
    one = [t for t in timings.get(ours, []) if t.method == ONE]
    others = [t for t in timings.get(theirs, []) if t.method != ONE]
    both = bool(one and others)
    return Longest(
        model=name,
        source=settings.text.stem if settings.text else "held-out novels",
        one_forward=one_forward,
        autoregressive=one_by_one,
        grids=(tuple(sorted(exact)), tuple(sorted(grid))),
        one_forward_length=ours,
        autoregressive_length=theirs,
        one_forward_timing=_fastest(one, 1) if one else None,
        autoregressive_timing=_fastest(others, 1) if others else None,
        autoregressive_fit_seconds_per_text=spent / settings.texts,
        ratio_batch_1=_ratio(_fastest(one, 1), _fastest(others, 1)) if both else None,
        ratio_best_batch=_ratio(_fastest(one), _fastest(others)) if both else None,
    )


def _by_text(exact: dict[int, list[bool]], texts: int) -> tuple[int, ...]:
    """Find for each text the largest length up to which it is exact at every length of the grid."""
    longest = [0] * texts
    for length in sorted(exact):
        for t in range(texts):
            whole_so_far = longest[t] == max((n for n in exact if n < length), default=0)
            if exact[length][t] and whole_so_far:
                longest[t] = length
    return tuple(longest)


def _texts(lm: FrozenLM, settings: BenchSettings, length: int) -> list[list[int]]:
    path = settings.text or Path(path_of(BUILT_IN[0])) / "held_out.txt"
    pieces = chunks(lm, read_text(path), length, settings.texts)
    if len(pieces) < settings.texts or len(pieces[-1]) < length:
        raise ValueError(f"text: {path} has fewer than {settings.texts} pieces of {length} tokens")
    return pieces


def _profiled(lm: FrozenLM, settings: BenchSettings) -> ProfiledSteps | None:
    """Return what profiles the steps that the settings name, None where they name none."""
    if settings.profile is None:
        return None
    return ProfiledSteps(Capture(lm.device, None), settings.profile)


def _step_seconds(
    lm: FrozenLM, targets: list[Tensor], arrangement: Arrangement,
    look: Callable[[FitEvent], None] | None,
) -> float:  # fmt: skip
    """Measure the median seconds of a fit step of all texts together."""
    marks: list[tuple[float, int]] = []

    def mark(event: FitEvent) -> None:
        marks.append((time.perf_counter(), int(event.steps.max())))
        if look is not None:
            look(event)

    steps = 6 if lm.device.type == "cpu" else 60
    recipe = dataclasses.replace(recipe_of("paper"), max_steps=steps)
    groups = make_groups(targets, [0], None, None)
    setup = Setup(lm, OneForward(arrangement), recipe, "auto", len(targets))
    for _ in run(setup, groups, lambda finished: [None] * len(finished), mark):
        pass
    between = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    return statistics.median(seconds / made for seconds, made in between if made)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
