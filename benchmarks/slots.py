"""A long queue through few slots: what continuous batching costs, and whether it changes results.

    python benchmarks/slots.py --model ../shared/models/stories3m \
        --text ../shared/corpora/tinystories/valid.txt

fits 1,000 texts through 32 slots and reports

* text·steps per second, refills and verification included, against those of a full batch that
  nobody enters or leaves, timed in turn with it in the same process;
* memory over time (resident, or allocated on CUDA) and page faults a step;
* for a sample of the texts: losses of the first steps, ids and steps of the fit alone.

The record is written anew every minute, with "complete": false until the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from record import RESULTS, provenance, write
from torch import Tensor

import prototok
from prototok import FrozenLM
from prototok.common.memory import resident
from prototok.fitting.driver import fit_groups
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import StepRunner, step_runner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.fast_fit import FitEvent, one_forward
from prototok.fitting.recipe import FAST, Recipe
from prototok.fitting.verify import verify
from prototok.model.load import BUILT_IN
from prototok.results.arrangement import Arrangement
from prototok.texts.files import read_text

PACKAGE = Path(prototok.__file__).parent
LOSSES = 20  # first losses of a text that are compared with those of its fit alone


def texts_of(lm: FrozenLM, path: Path, count: int, length: int) -> list[Tensor]:
    """Paragraphs of at least `length` tokens, cut; where they are too few, consecutive pieces."""
    text = read_text(path)
    paragraphs = [lm.encode(part)[:length] for part in text.split("\n\n")]
    found = [ids for ids in paragraphs if len(ids) == length]
    if len(found) < count:
        ids = lm.encode(text)
        found = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if len(found) < count:
        raise SystemExit(f"{path} has {len(found)} texts of {length} tokens, not {count}")
    return [torch.tensor(ids) for ids in found[:count]]


def full_batch(lm: FrozenLM, texts: list[Tensor], recipe: Recipe, rows: int) -> StepRunner:
    """Slots that nobody leaves: a goal out of reach, no end of updates in sight."""
    endless = dataclasses.replace(recipe, margin=1e9, max_steps=10**9)
    groups = make_groups(texts[:rows], [0], None, None)
    inputs = OneForward(Arrangement.parse("e m*"))
    setup = Setup(lm, inputs, endless, "auto", rows)
    slots = Slots(setup, Room(rows, rows, len(texts[0])))
    slots.admit(groups)
    return step_runner(lm, slots, rows)


def memory(device: torch.device) -> int:
    """Bytes in use: resident, or on CUDA the most that was allocated since the last look."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    return resident()


def clocks(device: torch.device) -> tuple[float, float]:
    """Seconds on the wall and of this process's CPU, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def singles(
    lm: FrozenLM, texts: list[Tensor], recipe: Recipe, found: dict[int, dict], losses: dict
) -> list[dict]:
    """The fits alone of the texts that were followed, beside what the queue made of them."""
    compared = []
    for t, in_queue in losses.items():
        alone: list[float] = []
        fit = prototok.fast_fit(
            lm, [texts[t]], recipe=recipe, progress=False,
            callback=lambda event, seen=alone: seen.extend(event.loss.tolist()),
        )  # fmt: skip
        pairs = list(zip(in_queue, alone[: len(in_queue)], strict=True))
        compared.append(
            {
                "text": t,
                "loss_difference": max((abs(a - b) / b for a, b in pairs), default=None),
                "exact": [found[t]["exact"], bool(fit.exact)],
                "steps": [found[t]["steps"], int(fit.steps)],
            }
        )
        print(f"text {t}: exact {compared[-1]['exact']}, steps {compared[-1]['steps']}", flush=True)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=BUILT_IN[0])
    parser.add_argument(
        "--text", type=Path, default=PACKAGE / "models" / BUILT_IN[0] / "held_out.txt"
    )
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--singles", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=FAST.max_steps)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "slots.json")
    a = parser.parse_args()
    if min(a.texts, a.length, a.slots, a.max_steps) < 1 or not 0 <= a.singles <= a.texts:
        parser.error("texts, length, slots and max-steps are positive; singles at most texts")
    lm = prototok.load(a.model, a.device)
    recipe = dataclasses.replace(FAST, max_steps=a.max_steps)
    texts = texts_of(lm, a.text, a.texts, a.length)
    slots = min(a.slots, a.texts)
    reference = full_batch(lm, texts, recipe, slots)
    for _ in range(5):  # by then it is known how many steps a burst has
        reference.advance(reference.burst)
    burst = reference.burst

    followed = set(range(0, a.texts, -(-a.texts // a.singles))) if a.singles else set()
    losses: dict[int, list[float]] = defaultdict(list)
    found: dict[int, dict] = {}
    looks: list[tuple[float, float, int]] = []  # wall and CPU seconds and rows between two looks
    full: list[tuple[float, float]] = []  # the same for a burst of the full batch
    over_time: list[dict] = []
    last = clocks(lm.device)
    started = time.perf_counter()

    def observe(event: FitEvent) -> None:
        nonlocal last
        now = clocks(lm.device)
        looks.append((now[0] - last[0], now[1] - last[1], len(event.rows)))
        for row, loss in zip(event.rows.tolist(), event.loss.tolist(), strict=True):
            if row in followed and len(losses[row]) < LOSSES and lm.device.type == "cpu":
                losses[row].append(loss)
        if len(looks) % 20 == 0:
            before = clocks(lm.device)
            reference.advance(burst)
            after = clocks(lm.device)
            full.append((after[0] - before[0], after[1] - before[1]))
        if len(looks) % 200 == 0 or not over_time:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            over_time.append(
                {"look": len(looks), "bytes": memory(lm.device), "minor_faults": faults}
            )
        last = clocks(lm.device)

    def record(compared: list[dict] | None = None) -> dict:
        steps = [f["steps"] for f in found.values()]
        spent = [sum(look[c] for look in looks) for c in (0, 1)]
        whole = [[t[c] for t in full] for c in (0, 1)]
        useful = sum(s + 1 for s in steps)  # a text of s updates was scored s + 1 times

        def against(text_steps: float, seconds: float, clock: int) -> float | None:
            """Text·steps per second over those of the full batch, by the median of its bursts."""
            if not seconds or not whole[clock]:
                return None
            return text_steps / seconds * statistics.median(whole[clock]) / (slots * burst)

        busy = [look for look in looks if look[2] == slots]
        return provenance() | {
            "complete": compared is not None,
            "model": lm.identity.name.rsplit("/", 1)[-1],
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": lm.device.type,
            "recipe": dataclasses.asdict(recipe),
            "texts": a.texts, "length": a.length, "slots": slots, "ended": len(found),
            "exact": sum(f["exact"] for f in found.values()),
            "steps_quartiles": statistics.quantiles(steps, n=4) if len(steps) > 1 else steps,
            "wall_seconds": spent[0], "cpu_seconds": spent[1],
            "text_steps": useful,
            "text_steps_per_second": useful / spent[0] if spent[0] else None,
            "share_of_full_batch": {
                # All of it, the last texts included, when slots stand empty.
                "wall": against(useful, spent[0], 0), "cpu": against(useful, spent[1], 1),
                # While every slot is taken.
                "slots_taken_cpu": against(
                    sum(n for *_, n in busy) * burst, sum(c for _, c, _ in busy), 1
                ),
            },
            "full_batch_cpu_seconds_a_step_quartiles": (
                [q / burst for q in statistics.quantiles(whole[1], n=4)] if len(full) > 1 else None
            ),
            "memory": over_time,
            "singles": compared,
        }  # fmt: skip

    groups = make_groups(texts, [0], None, None)
    setup = one_forward(lm, Arrangement.parse("e m*"), recipe, None, "auto", slots)
    fits = fit_groups(setup, groups, verify, observe)
    written = time.perf_counter()
    for _, (one,) in fits:
        found[one.row.index] = {"exact": one.check.exact, "steps": one.steps}
        if time.perf_counter() - written > 60:
            written = time.perf_counter()
            write(record(), a.out)
            print(f"{len(found)} of {a.texts} after {written - started:.0f} s", flush=True)
    reference.finish()
    write(record(), a.out)
    followed_losses = {t: losses[t] for t in sorted(followed)}
    result = record(singles(lm, texts, recipe, found, followed_losses))
    write(result, a.out)
    keys = ("ended", "exact", "text_steps_per_second", "share_of_full_batch", "complete")
    print(json.dumps({key: result[key] for key in keys}))


if __name__ == "__main__":
    main()
