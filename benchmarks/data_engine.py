"""What it costs to fit very many texts: texts an hour, memory over the run, and what kills leave.

    python benchmarks/data_engine.py                          rates on this machine, and on a GPU
    python benchmarks/data_engine.py --long 20480 --kills 6   memory and kills, of one long run

Rates: `fit_stream` on windows of each built-in model's held-out text, one shard a length; CPU time
and wall time of everything, tokens to files. On a GPU, by the rehearsal (docs/gpu.md): a step of
full slots, times the steps a text took here. Nothing is timed there, and verification is counted
apart: two decodings of each text alone, launched one by one without a graph, at an assumed 8 µs a
launch of the host.

The long run: `prototok dataset` in processes of its own, once in peace and once with SIGKILL at
random moments and --resume after each. Both must have written the same vectors, bit for bit, and
the same records but for their seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")  # for the rehearsal, before triton is imported

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from record import RESULTS, provenance
from transformers import AutoConfig, AutoModelForCausalLM

import prototok
from prototok import FrozenLM, Shards
from prototok.common.memory import resident
from prototok.model.load import path_of
from prototok.texts.files import read_text

OUT = RESULTS / "data_engine.json"
# Texts a cell: what takes well under a minute of one core.
CELLS = {
    ("tiny-neox", 8, "fast"): 2048, ("tiny-neox", 8, "learned"): 8192,
    ("tiny-neox", 16, "fast"): 512,
    ("tiny-llama", 8, "fast"): 1024, ("tiny-llama", 8, "learned"): 2048,
    ("tiny-llama", 16, "fast"): 128,
}  # fmt: skip
LAUNCH, DECODINGS = 8e-6, 2  # seconds of the host a launch, assumed; decodings that verify a text
GPU_POSITIONS = 65536  # of full slots


def windows(lm: FrozenLM, length: int, count: int) -> torch.Tensor:
    """Return (count, length) ids: windows spread evenly over held-out text; they may overlap."""
    ids = torch.tensor(lm.encode(read_text(Path(path_of(lm.identity.name)) / "held_out.txt")))
    starts = torch.linspace(0, len(ids) - length, count).long()
    return ids[starts[:, None] + torch.arange(length)]


def rate(name: str, length: int, count: int, recipe: str) -> dict[str, Any]:
    """Fit `count` texts into a folder; return what it took."""
    lm = prototok.load(name, device="cpu")
    texts = windows(lm, length, count)
    prototok.fast_fit(lm, texts[:8], recipe=recipe, progress=False)  # warm
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall = time.process_time(), time.monotonic()
        found = prototok.fit_stream(
            lm, iter(texts), Path(folder) / "F", recipe=recipe, progress=False
        )
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        records = Shards(Path(folder) / "F")[0].records
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    return {
        "model": name, "length": length, "recipe": recipe, "texts": count, "exact": found.exact,
        "steps_median": statistics.median(records["steps"].to_pylist()),
        "steps_a_text": found.steps / count, "bytes_a_text": size / count,
        "cpu_ms_a_text": 1000 * cpu / count, "wall_ms_a_text": 1000 * wall / count,
        "texts_an_hour": 3600 * count / wall,
    }  # fmt: skip


def on_gpu(name: str, length: int, steps: float) -> dict[str, Any]:
    """Estimate by a rehearsal what a text costs on a GPU that takes `steps` steps here."""
    from rehearse import GPUS

    from prototok.fitting.engine.step import step
    from rehearsal import frozen, rehearsal, slots_of

    config = AutoConfig.from_pretrained(path_of(name))
    rows = GPU_POSITIONS // length
    with rehearsal() as seen:
        lm = frozen(lambda: AutoModelForCausalLM.from_config(config))
        slots = slots_of(lm, "e m*", rows, length)
        lm.body.tables(slots.inputs.input_length(length))
        seen.launches.clear()
        step(lm, slots, rows)
    seconds = [sum(map(gpu.seconds, seen.launches)) for gpu in GPUS]
    forward = sum(launch.part in ("forward", "head") for launch in seen.launches)
    step_us = [1e6 * s * steps / rows for s in seconds]
    verify_us = 1e6 * DECODINGS * forward * LAUNCH
    return {
        "rows": rows, "launches_a_step": len(seen.launches),
        "ms_a_step": [1000 * s for s in seconds],
        "us_of_steps_a_text": step_us, "us_of_verification_a_text": verify_us,
        "texts_an_hour": [3600e6 / (us + verify_us) for us in step_us],
        "texts_an_hour_steps_alone": [3600e6 / us for us in step_us],
        "gpus": [str(gpu) for gpu in GPUS],
    }  # fmt: skip


def long_run(
    texts: int, limit: int, kills: int, length: int, shard: int, seed: int
) -> dict[str, Any]:
    """Fit texts in peace, and the first `limit` of them under kills, at the same time.

    Return memory over the run, and which shards differ.
    """
    name = "tiny-neox"
    ids = windows(prototok.load(name, device="cpu"), length, texts).tolist()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        pq.write_table(pa.table({"ids": ids}), folder / "texts.parquet")
        command = [sys.executable, "-m", "prototok", "dataset", "texts.parquet", "--column", "ids"]
        command += ["--model", name, "--shard", str(shard), "--device", "cpu", "--resume", "-o"]
        memory: list[dict[str, float]] = []
        process = start([*command, "straight"], folder)
        watcher = threading.Thread(target=watch, args=(process, folder / "straight", memory))
        watcher.start()
        draw = random.Random(seed)
        sent = 0
        while True:
            process = start([*command, "killed", "--limit", str(limit)], folder)
            if sent < kills and interrupted(process, folder / "killed", draw):
                sent += 1
                continue
            if process.wait():
                raise SystemExit("the run that was killed did not end well")
            if sent == kills:
                break
        watcher.join()
        straight, killed = Shards(folder / "straight"), Shards(folder / "killed")
        if not straight.complete or len(killed) != -(-limit // shard):
            raise SystemExit("the run that nobody disturbed did not end well")
        pairs = zip(straight[: len(killed)], killed, strict=True)
        apart = [a.number for a, b in pairs if not same(a, b)]
        found, again = straight.summary(), killed.summary()
    rise = [m["mib"] for m in memory]
    return {
        "model": name, "length": length, "texts": found.texts, "shard": shard,
        "exact": found.exact, "refused": found.refused, "shards": found.shards, "memory": memory,
        "mib_after_first_shard": rise[0], "mib_at_the_end": rise[-1], "mib_most": max(rise),
        "kills": sent, "killed_texts": again.texts, "killed_shards": again.shards,
        "shards_that_differ": apart,
    }  # fmt: skip


def start(command: list[str], folder: Path) -> subprocess.Popen:
    options: dict[str, Any] = {"stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, **options)


def watch(process: subprocess.Popen, folder: Path, memory: list[dict[str, float]]) -> None:
    """Note the memory of a process each time that a shard ended, until it ends."""
    page = os.sysconf("SC_PAGE_SIZE")
    seen = 0
    while process.poll() is None:
        done = len(list(folder.glob("*/shard.json")))
        if done > seen:
            seen = done
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            memory.append({"shards": done, "mib": pages * page / (1 << 20)})
            print(memory[-1], flush=True)
        time.sleep(0.2)


def interrupted(process: subprocess.Popen, folder: Path, draw: random.Random) -> bool:
    """Kill a process some time after its next shard or two; False where it ended before."""
    until = len(list(folder.glob("*/shard.json"))) + draw.choice((0, 1, 2))
    while len(list(folder.glob("*/shard.json"))) < until and process.poll() is None:
        time.sleep(0.05)
    end = time.monotonic() + draw.uniform(0, 20)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed with {len(list(folder.glob('*/shard.json')))} shards", flush=True)
    return True


def same(a: prototok.results.shards.Shard, b: prototok.results.shards.Shard) -> bool:
    """Return True if two shards have the same vectors, bit for bit, and records but for seconds."""
    vectors = all(torch.equal(a.vectors[name], b.vectors[name]) for name in "em")
    records = [s.records.drop_columns(["seconds"]) for s in (a, b)]
    return vectors and records[0].equals(records[1]) and a.record == b.record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--long", type=int, help="texts of the long run, instead of the rates")
    parser.add_argument("--length", type=int, default=4, help="tokens a text of the long run")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--killed", type=int, help="its texts that are fitted under kills, too")
    parser.add_argument("--shard", type=int, default=1024, help="of the long run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    record: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {}
    if a.long:
        found = long_run(a.long, a.killed or a.long, a.kills, a.length, a.shard, a.seed)
        record["long"] = provenance() | found
        last = {key: found[key] for key in ("texts", "kills", "shards_that_differ", "mib_most")}
    else:
        cells = []
        for (name, length, recipe), count in CELLS.items():
            cell = rate(name, length, count, recipe)
            print(json.dumps(cell), flush=True)
            if recipe == "fast":  # a rehearsal knows nothing of what the networks cost
                cell["gpu"] = on_gpu(name, length, cell["steps_a_text"])
            cells.append(cell)
        record["rates"] = provenance() | {"cells": cells, "mib_at_the_end": resident() / (1 << 20)}
        last = {
            f"{c['model']} {c['length']} {c['recipe']}": round(c["texts_an_hour"]) for c in cells
        }
    a.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten to {a.out}")
    print(json.dumps(last))


if __name__ == "__main__":
    main()
