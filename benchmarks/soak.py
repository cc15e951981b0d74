"""Fit, decode, save and load for a long time, and see whether anything grows.

    python benchmarks/soak.py --minutes 120 --out soak.json

Every window of some seconds ends with a look at the process: resident memory, open files, threads,
temporary files in the folder that it writes to, and texts a second of this process's CPU time (so
that a neighbour on the machine does not pass for a fall). The first quarter of the windows is
warm-up. What is reported of the others is the median slope between all pairs of windows
(Theil–Sen), which a single odd window does not move. Exit code 1 where memory grows by more than
5 % of itself over the run, throughput falls by more than 20 %, or anything that is counted grows by
one or more. Last line of stdout: by how much each grew, as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import prototok
from prototok.bench.machine import describe
from prototok.common.files import write_text
from prototok.common.memory import resident
from prototok.results.mem_fit import MemFit

MEMORY, THROUGHPUT = 0.05, 0.20  # shares by which they may grow or fall over the run
COUNTED = ("handles", "threads", "temporary_files")
BATCH = 8  # texts a fit


@dataclass(frozen=True)
class Window:
    """A look at the process at the end of a window.

    minutes since the start; CPU time of this process so far, in minutes; resident memory in MiB;
    texts fitted, decoded, saved and loaded a CPU second; numbers of open files, of threads and of
    files left in the folder.
    """

    minutes: float
    cpu_minutes: float
    memory: float
    throughput: float
    handles: int
    threads: int
    temporary_files: int


def rounds(lm: prototok.FrozenLM, folder: Path, seed: int = 0) -> Iterator[int]:
    """Yield the texts of each round: other texts, lengths and seeds every time, in both modes."""
    generator = torch.Generator().manual_seed(seed)
    recipe = prototok.Recipe(name="soak", max_steps=20)
    for number in itertools.count():
        length = 1 + number % 12
        ids = torch.randint(lm.vocab_size, (BATCH, length), generator=generator)
        if number % 4 == 3:
            mem = prototok.autoregressive.fit(
                lm, ids[:2, :4], seeds=[number], recipe=recipe, progress=False
            )
            mem.save(folder / "mem.safetensors")
            prototok.autoregressive.generate(
                lm, MemFit.load(folder / "mem.safetensors").mem, min(length, 4)
            )
            yield 2
            continue
        share = "m" if number % 4 == 2 else None
        prefix = [number % lm.vocab_size] if number % 3 == 2 else None
        fit = prototok.fast_fit(
            lm, ids, seeds=[number], share=share, prefix=prefix, recipe=recipe, progress=False
        )
        fit.save(folder / "fit", overwrite=True)
        loaded = prototok.FitResult.load(folder / "fit")
        if not torch.equal(prototok.decode(lm, loaded.tokens), prototok.decode(lm, fit.tokens)):
            raise RuntimeError(f"round {number}: what was loaded decodes to something else")
        prototok.information(lm, ids)
        yield BATCH


def soak(
    minutes: float, window: float, folder: Path, say: Callable[[str], None] = print
) -> list[Window]:
    """Work for so many minutes and look at the process every `window` seconds."""
    lm = prototok.load("tiny-llama", device="cpu")
    work = rounds(lm, folder)
    start = last = time.monotonic()
    busy = time.process_time()
    texts, found = 0, []
    while time.monotonic() - start < 60 * minutes:
        texts += next(work)
        now = time.monotonic()
        if now - last < window:
            continue
        spent = time.process_time() - busy
        found.append(look((now - start) / 60, texts / spent, folder))
        say(" ".join(f"{name} {value:.6g}" for name, value in asdict(found[-1]).items()))
        last, busy, texts = now, busy + spent, 0
    return found


def look(minutes: float, throughput: float, folder: Path) -> Window:
    """Look at this process through /proc."""
    return Window(
        minutes=minutes,
        cpu_minutes=time.process_time() / 60,
        memory=resident() / 2**20,
        throughput=throughput,
        handles=len(os.listdir("/proc/self/fd")),
        threads=max(threading.active_count(), len(os.listdir("/proc/self/task"))),
        temporary_files=sum(path.is_file() for path in folder.rglob("*")),
    )


def growth(windows: list[Window], name: str) -> float:
    """Return by how much a quantity grows over the run: the median slope times its minutes."""
    pairs = itertools.combinations(windows, 2)
    slopes = [
        (getattr(b, name) - getattr(a, name)) / (b.minutes - a.minutes)
        for a, b in pairs
        if b.minutes > a.minutes
    ]
    return statistics.median(slopes) * (windows[-1].minutes - windows[0].minutes)


def judge(windows: list[Window]) -> dict[str, dict[str, float | bool]]:
    """Return for each quantity its median, its growth over the run, and whether that is too much.

    Raises:
        ValueError: fewer than eight windows, too few to tell.
    """
    if len(windows) < 8:
        raise ValueError(f"minutes: {len(windows)} windows are too few to tell; 8 are needed")
    settled = windows[len(windows) // 4 :]
    found: dict[str, dict[str, float | bool]] = {}
    for name in ("memory", "throughput", *COUNTED):
        median = statistics.median(getattr(w, name) for w in settled)
        grown = growth(settled, name)
        if name == "memory":
            bad = grown > MEMORY * median
        elif name == "throughput":
            bad = grown < -THROUGHPUT * median
        else:
            bad = grown >= 1
        found[name] = {"median": median, "growth": grown, "too_much": bad}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--window", type=float, help="seconds; default: a sixtieth of the time")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    window = options.window or max(1.0, options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        windows = soak(options.minutes, window, Path(folder))
    verdict = judge(windows)
    for name, row in verdict.items():
        verdict_of = "GROWS" if row["too_much"] else "flat"
        print(
            f"{name}: median {row['median']:.6g}, over the run {row['growth']:+.4g}, {verdict_of}"
        )
    record = {
        "machine": describe(), "minutes": options.minutes, "window_seconds": window,
        "verdict": verdict, "windows": [asdict(w) for w in windows],
    }  # fmt: skip
    write_text(options.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: row["growth"] for name, row in verdict.items()}))
    sys.exit(any(row["too_much"] for row in verdict.values()))


if __name__ == "__main__":
    main()
