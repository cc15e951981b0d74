"""Kill sweeps, fits, data sets and measurements of capacity with SIGKILL; see what is left.

    python benchmarks/kills.py --sweep 40 --fit 30 --capacity 30 --dataset 30

A sweep of short fits runs with two workers, and another one where it is done too soon; SIGKILL
goes to the driver (one time in three) or to a worker, most often while shards are being written,
otherwise while processes are starting. `prototok fit --resume`, `prototok capacity --resume` and
`prototok dataset --resume` get it at a moment drawn from the time that they take, and are started
again until they end, then anew. These are forked from a process that has torch already, so that few
of the kills meet an import.

After every kill each file that has its name must be whole, what was seen before must still be
there, and nothing may be there twice. In the end the result must be that of a run that nobody
disturbed: the same texts, each as exact; of a data set the same vectors, bit for bit. `prototok
sweep verify` must find no problem.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from record import RESULTS, provenance, write
from safetensors import safe_open

import prototok
from prototok import FitResult
from prototok.cli import main as prototok_main
from prototok.common.files import is_temporary
from prototok.results.shards import Shard, ShardRecord, Shards
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
BOOK = Path(prototok.__file__).parent / "models" / "tiny-llama" / "held_out.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sweep", type=int, default=40, help="kills of a sweep")
    parser.add_argument("--fit", type=int, default=30, help="kills of prototok fit")
    parser.add_argument("--capacity", type=int, default=30, help="kills of prototok capacity")
    parser.add_argument("--dataset", type=int, default=30, help="kills of prototok dataset")
    parser.add_argument("--texts", type=int, default=200, help="of the sweep; twice as many units")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    a = parser.parse_args()
    draw = random.Random(a.seed)
    torch.set_num_threads(1)  # a child that is forked has no threads of its parent's
    result: dict[str, dict] = {}
    asked = {"fit": a.fit, "capacity": a.capacity, "dataset": a.dataset, "sweep": a.sweep}
    for name, kills in asked.items():
        if not kills:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if name == "sweep":
                result[name] = kill_sweeps(Path(folder), kills, a.texts, a.workers, draw)
            else:
                result[name] = kill_command(Path(folder), name, kills, draw)
        print(f"{name}: {json.dumps(result[name])}", flush=True)
    sound = all(found["kills"] == asked[name] for name, found in result.items())
    sound &= not any(found["problems"] for found in result.values())
    write(provenance() | {"kills": sum(asked.values())} | result, a.out)
    print(json.dumps({name: found["kills"] for name, found in result.items()}))
    sys.exit(0 if sound else 1)


@dataclass
class Seen:
    """What was there after earlier kills, and what was wrong."""

    parts: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    torn: int = 0  # kills that left a file before it was whole


@dataclass(frozen=True)
class Command:
    """A command that keeps its parts, and how these and its result are looked at.

    `look` is given what the folder holds between two runs; `judge` what it holds in the end and the
    folder of the run that nobody disturbed.
    """

    arguments: list[str]
    look: Callable[[Path, Seen], None]
    judge: Callable[[Path, Path, Seen], None]


def kill_command(folder: Path, name: str, kills: int, draw: random.Random) -> dict:
    """Kill one command so often, letting it end and begin anew in between; say what went wrong."""
    command = COMMANDS[name]
    straight = folder / "straight"
    clock = time.monotonic()
    _, status = os.waitpid(fork(straight, command.arguments), 0)
    if status:
        raise RuntimeError(f"{name}: failed without a kill; {(straight / 'said').read_text()}")
    takes = time.monotonic() - clock
    started = time.monotonic()
    seen, sent, rounds = Seen(), 0, 0
    problems: list[str] = []
    while sent < kills:
        rounds += 1
        place = folder / f"round-{rounds}"
        seen = Seen(torn=seen.torn)
        while True:
            pid = fork(place, [*command.arguments, "--resume"])
            if sent < kills:
                time.sleep(draw.uniform(0, takes))
                kill(pid)
            _, status = os.waitpid(pid, 0)
            if os.WIFEXITED(status):
                break
            sent += 1
            seen.torn += any(is_temporary(path) for path in place.rglob("*"))
            command.look(place, seen)
        said = (place / "said").read_text()
        if os.WEXITSTATUS(status) and "none is unfinished" not in said:
            seen.problems.append(f"exit code {os.WEXITSTATUS(status)}: {said}")
        command.judge(place, straight, seen)
        problems += [f"round {rounds}: {problem}" for problem in seen.problems]
    return {
        "kills": sent,
        "kills_that_left_a_file_half_written": seen.torn,
        "runs_to_the_end": rounds,
        "problems": problems,
        "seconds_undisturbed": round(takes, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def fork(folder: Path, arguments: list[str]) -> int:
    """Run `prototok …` in a child that has torch already; what it says goes to a file."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        prototok_main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def keep(seen: Seen, found: dict[str, object], over: bool) -> None:
    """Hold parts against those that were seen before; `over`: the whole has taken their place."""
    for name, before in seen.parts.items():
        if name not in found and not over:
            seen.problems.append(f"part {name} is lost")
        elif name in found and found[name] != before:
            seen.problems.append(f"part {name} has changed")
    seen.parts |= found


def look_at_fit(place: Path, seen: Seen) -> None:
    parts = {}
    for path in place.glob("F/unfinished/*/fits.parquet"):
        with telling(seen, path):
            parts[path.parent.name] = FitResult.load(path.parent).tokens.e.flatten().tolist()
    over = (place / "F" / "fits.parquet").exists()
    if over:
        with telling(seen, place / "F"):
            FitResult.load(place / "F")
    keep(seen, parts, over)


def judge_fit(place: Path, straight: Path, seen: Seen) -> None:
    if sorted(os.listdir(place / "F")) != ["fits.parquet", "proto_tokens.safetensors"]:
        seen.problems.append(f"the folder holds {sorted(os.listdir(place / 'F'))}")
    ours, theirs = FitResult.load(place / "F"), FitResult.load(straight / "F")
    if [ids.tolist() for ids in ours.targets] != [ids.tolist() for ids in theirs.targets]:
        seen.problems.append("other texts than of the run that nobody disturbed")
    elif not torch.equal(ours.exact, theirs.exact):
        seen.problems.append("other texts are exact than in the run that nobody disturbed")
    for name, e in seen.parts.items():
        if ours.tokens.e[int(name)].flatten().tolist() != e:
            seen.problems.append(f"part {name} was kept and is not in the whole")


def look_at_capacity(place: Path, seen: Seen) -> None:
    """Parts are replaced here, by ones that are further."""
    for path in place.glob("c.csv.unfinished/0*"):
        with telling(seen, path), safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["prototok"])
            now = (header["stage"], header["failed"], header["steps"])
            if now < seen.parts.get(path.name, now):
                seen.problems.append(f"part {path.name} has gone back")
            seen.parts[path.name] = now
    there = {path.name for path in place.glob("c.csv.unfinished/0*")}
    if seen.parts.keys() - there and not (place / "c.csv").exists():
        seen.problems.append(f"parts {sorted(seen.parts.keys() - there)} are lost")


def judge_capacity(place: Path, straight: Path, seen: Seen) -> None:
    left = sorted(set(os.listdir(place)) - {"said"})
    if left != ["c.csv"]:
        seen.problems.append(f"the folder holds {left}")
    lines = [(p / "c.csv").read_text().splitlines() for p in (place, straight)]
    ours, theirs = ([line.split(",")[:4] for line in part] for part in lines)
    if ours != theirs:
        seen.problems.append("another table than that of the run that nobody disturbed")
    steps = {f"{int(line.split(',')[0]):08d}": int(line.split(",")[4]) for line in lines[0][1:]}
    for name, (_, _, before) in seen.parts.items():  # type: ignore[misc]
        if steps.get(name, 0) < before:
            seen.problems.append(f"part {name} was kept and is not in the whole")


def look_at_dataset(place: Path, seen: Seen) -> None:
    parts: dict[str, object] = {}
    if (place / "F" / "fit.json").exists():
        with telling(seen, place / "F"):
            for shard in Shards(place / "F"):
                shard.load()
                parts[str(shard.number)] = contents(shard)
    keep(seen, parts, over=False)


def judge_dataset(place: Path, straight: Path, seen: Seen) -> None:
    look_at_dataset(place, seen)
    ours, theirs = Shards(place / "F"), Shards(straight / "F")
    if sorted(os.listdir(place / "F")) != sorted(os.listdir(straight / "F")):
        seen.problems.append(f"the folder holds {sorted(os.listdir(place / 'F'))}")
    elif [contents(shard) for shard in ours] != [contents(shard) for shard in theirs]:
        seen.problems.append("other shards than of the run that nobody disturbed")


def contents(shard: Shard) -> tuple[ShardRecord, list, list]:
    """What a shard holds, but for seconds."""
    vectors = [part.flatten().tolist() for part in shard.vectors.values()]
    return shard.record, vectors, shard.records.drop_columns(["seconds"]).to_pylist()


@contextlib.contextmanager
def telling(seen: Seen, path: Path) -> Iterator[None]:
    """Note a file that has its name and cannot be read."""
    try:
        yield
    except Exception as error:
        seen.problems.append(f"{path}: {error}")


COMMANDS = {
    "fit": Command(
        ["fit", str(BOOK), "-o", "F", "--length", "1", "--limit", "24", "--batch-size", "4",
         "--device", "cpu"],
        look_at_fit, judge_fit,
    ),
    "capacity": Command(
        ["capacity", str(BOOK), "-o", "c.csv", "--texts", "4", "--longest", "5", "--device", "cpu"],
        look_at_capacity, judge_capacity,
    ),
    "dataset": Command(
        ["dataset", str(BOOK), "-o", "F", "--length", "1", "--limit", "24", "--shard", "4",
         "--device", "cpu"],
        look_at_dataset, judge_dataset,
    ),
}  # fmt: skip


def kill_sweeps(folder: Path, kills: int, texts: int, workers: int, draw: random.Random) -> dict:
    """Kill sweeps until `kills` were sent: one that is done before that is followed by another."""
    found: dict = {}
    while found.get("kills", 0) < kills:
        place = folder / str(found.get("runs_to_the_end", 0))
        place.mkdir()
        one = kill_sweep(place, kills - found.get("kills", 0), texts, workers, draw)
        if not one["kills"]:
            raise RuntimeError("sweep: done before a kill came; give it more --texts")
        found = {key: found[key] + one[key] for key in one} if found else one
    return found


def kill_sweep(folder: Path, kills: int, texts: int, workers: int, draw: random.Random) -> dict:
    """Kill until `kills` were sent, let the run finish, and say what went wrong."""
    (folder / "config.yaml").write_text(CONFIG.format(texts=texts))
    plan = ["plan", "table3", "--preset", "small", "--config", "config.yaml", "-o"]
    for name in ("run", "straight"):
        sweep(folder, *plan, name)
    run, straight = RunFolder.open(folder / "run"), RunFolder.open(folder / "straight")
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
        look_at_sweep(run, seen)
        torn += any(path.name != "lock" for path in (run.path / "tmp").iterdir())
        if who == "driver":
            driver.wait()
            driver = None
    code = (driver or start(folder, workers)).wait()
    spent = time.monotonic() - started
    problems = [] if code == 0 else [f"exit code {code}"]
    for name, before in seen.items():
        path = run.path / "fits" / name
        if not path.exists() or sha256_of(path) != before:
            problems.append(f"{name} was done and is lost, or has changed")
    problems += [f"{key} is not done" for key in set(run.units()) - run.done()]
    sweep(folder, "run", "straight", "--workers", str(workers), "--device", "cpu")
    ours, theirs = (results(part) for part in (run, straight))
    if len(ours) != run.fits().num_rows:
        problems.append("rows are there twice")
    problems += [f"{at}: {ours.get(at)}, undisturbed {theirs[at]}" for at in theirs
                 if ours.get(at) != theirs[at]]  # fmt: skip
    checked = sweep(folder, "verify", "run", "--sample", "64", "--device", "cpu", fails=True)
    return {
        "kills": sum(sent.values()),
        "kills_of_driver": sent["driver"],
        "kills_of_workers": sent["worker"],
        "kills_that_left_a_file_half_written": torn,
        "driver_starts": starts,
        "runs_to_the_end": 1,
        "units": len(run.units()),
        "units_seen_done_before_a_kill": len(seen),
        "problems": problems + checked.stdout.splitlines(),
        "verify": checked.stderr.strip().splitlines()[-1:],
        "seconds": round(spent, 1),
    }


def results(run: RunFolder) -> dict[tuple[str, int], tuple[list[int], bool]]:
    """What was asked of each row, and whether it came back."""
    rows = run.fits().to_pylist()
    return {(row["key"], row["row"]): (row["target_ids"], row["exact"]) for row in rows}


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


def look_at_sweep(run: RunFolder, seen: dict[str, str]) -> None:
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
