"""Kill a sweep's driver and workers with SIGKILL at random moments, and see what is left.

    python benchmarks/kill_sweep.py --kills 50

plans short fits, runs them with two workers, and sends SIGKILL to the driver (one time in three) or
to a worker, most often while shards are being written, otherwise while processes are starting. A
driver that was killed is started again. In the end every unit must be done, every shard that was
ever seen must be there unchanged, no row may be there twice, and `prototok sweep verify` must find
every file whole and a sample of units decoding to what is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import RESULTS, provenance, write

from prototok.sweep.files import sha256_of
from prototok.sweep.run_folder import RunFolder

CONFIG = """\
models: tiny-llama
sources: random
texts: {texts}
lengths: [2, 3]
share: none
changes: {{max_steps: 200}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--texts", type=int, default=2000, help="twice as many units")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_sweep.json")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = trial(Path(folder), a.kills, a.texts, a.workers, random.Random(a.seed))
    write(provenance() | result, a.out)
    print(json.dumps(result))
    sound = result["kills"] == a.kills and result["exit_code"] == 0 and not any(
        result[name] for name in ("units_left", "units_lost", "units_changed", "rows_twice")
    )  # fmt: skip
    sys.exit(0 if sound and not result["problems"] else 1)


def trial(folder: Path, kills: int, texts: int, workers: int, draw: random.Random) -> dict:
    """Kill until `kills` were sent, let the run finish, and count what went wrong."""
    (folder / "config.yaml").write_text(CONFIG.format(texts=texts))
    sweep(folder, "plan", "table3", "--preset", "small", "--config", "config.yaml", "-o", "run")
    run = RunFolder.open(folder / "run")
    seen: dict[str, str] = {}  # shard → hash, when it was first seen
    sent = {"driver": 0, "worker": 0}
    torn = starts = 0
    started = time.monotonic()
    driver = None
    while sum(sent.values()) < kills:
        if driver is None:
            driver = start(folder, workers)
            starts += 1
        wait(run, driver, draw)
        if driver.poll() is not None:
            break  # finished before all kills were sent
        victims = children(driver.pid)
        who = "worker" if victims and draw.random() < 2 / 3 else "driver"
        kill(draw.choice(victims) if who == "worker" else driver.pid)
        sent[who] += 1
        look(run, seen)
        torn += any(path.name != "lock" for path in (run.path / "tmp").iterdir())
        if who == "driver":
            driver.wait()
            driver = None
    driver = driver or start(folder, workers)
    code = driver.wait()
    lost, changed = 0, 0
    for name, before in seen.items():
        path = run.path / "fits" / name
        lost += not path.exists()
        changed += path.exists() and sha256_of(path) != before
    rows = run.fits()
    pairs = list(zip(rows["key"].to_pylist(), rows["row"].to_pylist(), strict=True))
    checked = sweep(folder, "verify", "run", "--sample", "64", "--device", "cpu", fails=True)
    return {
        "kills": sum(sent.values()),
        "kills_of_driver": sent["driver"],
        "kills_of_workers": sent["worker"],
        "kills_that_left_a_file_half_written": torn,
        "driver_starts": starts,
        "units": len(run.units()),
        "units_seen_done_before_a_kill": len(seen),
        "units_left": len(set(run.units()) - run.done()),
        "units_lost": lost,
        "units_changed": changed,
        "rows_twice": len(pairs) - len(set(pairs)),
        "problems": checked.stdout.splitlines(),
        "verify": checked.stderr.strip().splitlines()[-1],
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
    }


def sweep(folder: Path, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prototok", "sweep", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and not fails:
        raise RuntimeError(done.stderr)
    return done


def start(folder: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "prototok", "sweep", "run", "run", "--workers", str(workers)]
    # Random kills are no fault of the units they hit.
    command += ["--attempts", "1000", "--device", "cpu"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)


def wait(run: RunFolder, driver: subprocess.Popen, draw: random.Random) -> None:
    """Mostly until shards are being written and a little longer, otherwise a short while."""
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 3))
        return
    before = count(run)
    while count(run) == before and driver.poll() is None:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.5))


def count(run: RunFolder) -> int:
    return sum(1 for _ in os.scandir(run.path / "fits"))


def look(run: RunFolder, seen: dict[str, str]) -> None:
    """Remember the shards that are there now."""
    for path in (run.path / "fits").iterdir():
        if path.name not in seen:
            seen[path.name] = sha256_of(path)


def children(pid: int) -> list[int]:
    """The workers of a driver: its children but for the resource tracker."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [
            int(child)
            for child in found
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    except OSError:
        return []


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
