"""How much faster a sweep is with two workers than with one, each pinned to a core.

    python benchmarks/sweep_scaling.py

The same units, all of exactly as many steps (their goal cannot be reached), are done by one worker
on one core and by two workers on two, in turn. `ratio` is of the rates between each worker's first
batch and the last commit, so it leaves out starting Python and loading the model; `ratio_whole` is
of the whole command's wall time. Processor seconds tell the causes of a low
ratio apart: where two workers need no more of them but for one more start, they do not hinder each
other, and other work had the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import RESULTS, provenance, write

from prototok.sweep.run_folder import RunFolder

CONFIG = """\
models: tiny-neox
sources: random
texts: {texts}
lengths: [16]
share: none
changes: {{max_steps: {steps}, margin: 1.0e+6}}
"""
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep_scaling.json")
    a = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("sweep_scaling: needs two cores")
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "c.yaml").write_text(CONFIG.format(texts=a.texts, steps=a.steps))
        plan = ["plan", "table3", "--preset", "small", "--config", "c.yaml", "-o", "planned"]
        subprocess.run([sys.executable, "-m", "prototok", "sweep", *plan], cwd=folder, check=True)
        for _ in range(a.repeats):
            for workers, done in runs.items():
                done.append(one_run(folder, workers, set(cores[:workers])))
                print(f"{workers} workers: {done[-1]}", flush=True)
    pairs = list(zip(runs[1], runs[2], strict=True))
    ratios = [two["rate"] / one["rate"] for one, two in pairs]
    whole = [one["seconds"] / two["seconds"] for one, two in pairs]
    result = {
        "units": a.texts, "steps": a.steps, "rows_a_forward": BATCH,
        "load_before": load,
        "runs": runs,
        "ratio": statistics.median(ratios), "ratios": ratios,
        "ratio_whole": statistics.median(whole), "ratios_whole": whole,
    }  # fmt: skip
    write(provenance() | result, a.out)
    print(json.dumps({key: result[key] for key in ("ratio", "ratio_whole", "load_before")}))


def one_run(folder: Path, workers: int, cores: set[int]) -> dict[str, float]:
    """Do the plan afresh on some cores; units a second between commits, and seconds in all."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / "planned", folder / "run")
    run = RunFolder.open(folder / "run")
    command = [sys.executable, "-m", "prototok", "sweep", "run", "run", "--device", "cpu"]
    command += ["--workers", str(workers), "--batch-size", str(BATCH)]
    started, spent = time.perf_counter(), cpu_seconds()
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    commits = [(0, started)]  # how many were done, and when
    while process.poll() is None:
        number = sum(1 for _ in os.scandir(run.path / "fits"))
        if number > commits[-1][0]:
            commits.append((number, time.perf_counter()))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode or run.done() != set(run.units()):
        raise RuntimeError(f"sweep_scaling: the run ended with exit code {process.returncode}")
    # A batch of fixed steps ends as one, so the clock starts where the first of each worker ended.
    first, begin = next(commit for commit in commits if commit[0] >= workers * BATCH)
    last, end = commits[-1]
    return {
        "rate": (last - first) / (end - begin),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - spent,
    }


def cpu_seconds() -> float:
    """Of all processes that this one has waited for, and those they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
