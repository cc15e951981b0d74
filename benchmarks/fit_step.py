"""The fit step against plain transformers loops: text·steps per second, MFU, memory.

    python benchmarks/fit_step.py --preset stories3m --model ../shared/models/stories3m
    python benchmarks/fit_step.py --preset pythia-160m
    python benchmarks/fit_step.py --preset smollm2-135m --prefix 1
    python benchmarks/fit_step.py --preset stories3m --instructions avx512bf16

One text·step is one update of one text's e and m. Compared in turn, in one process and one dtype:

* ours: the engine's step as `fast_fit` runs it (on CUDA one graph a step), B rows;
* batched: transformers' forward of B rows, cross-entropy, autograd, torch's AdamW, argmax, with
  torch's fused attention or with the eager one, whichever is the faster here;
* paper: the same loop with one row, as the paper runs it, with the same attention.

With --prefix P all of them run behind P constant tokens, beside the engine's step without those
(bare), so that the record says what a prefix costs a step.

Before anything is timed, our losses and gradients of one step must equal the batched loop's. The
ratios are of text·steps per second, ours to theirs, median and quartiles over the rounds. FLOPs are
4·P a token, P all matrix weights with the head; MFU is against the dense peak of the GPU, or on the
CPU against a square product of this dtype measured here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import RESULTS, provenance, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import prototok
from prototok import FrozenLM, Recipe
from prototok.bench.machine import matmul_rate
from prototok.common.allocator import keep_freed_memory
from prototok.common.clock import once
from prototok.common.memory import resident
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import StepRunner, step_runner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.model.in_front import prefix_of
from prototok.model.shapes import SHAPES, random_model
from prototok.results.arrangement import Arrangement
from prototok_kernels.backend import instruction_set, this_machine

# Dense bf16 peaks as declared, FLOP/s, by what the device's name contains.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
ATTENTION = ("sdpa", "eager")  # transformers' names
# The names that oneDNN, which makes torch's products, has for our instruction sets.
ONEDNN = {"amx": "AVX512_CORE_AMX", "avx512bf16": "AVX512_CORE_BF16", "avx512": "AVX512_CORE"}
# How far ours may lie from the plain loop, relative: row losses, and the gradients' norm.
TOLERANCES = {torch.bfloat16: (1e-2, 0.1), torch.float32: (1e-5, 1e-3)}


@dataclass(frozen=True)
class Size:
    rows: int
    length: int


CPU = {
    "stories3m": Size(16, 64), "pythia-160m": Size(8, 128), "smollm2-135m": Size(8, 64),
    "smoke": Size(2, 8),
}  # fmt: skip
CUDA = {
    "stories3m": Size(512, 64), "pythia-160m": Size(256, 128), "pythia-410m": Size(128, 128),
    "pythia-1.4b": Size(128, 128), "smollm2-135m": Size(256, 64), "llama-3.2-1b": Size(64, 256),
    "llama-3.2-3b": Size(32, 256),
    "llama-3.1-8b": Size(16, 256), "smoke": Size(2, 8),
}  # fmt: skip


def model_of(preset: str, folder: str | None, device: torch.device) -> tuple[PreTrainedModel, str]:
    """The plain model in bf16, and what it is."""
    if folder is not None:
        made = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return made.to(device).eval(), Path(folder).name
    if preset in SHAPES:
        return random_model(preset, device, torch.bfloat16), f"{preset} (random weights)"
    torch.manual_seed(0)
    small = preset == "smoke"
    config = LlamaConfig(
        vocab_size=128 if small else 4096, hidden_size=32 if small else 192,
        intermediate_size=64 if small else 512, num_hidden_layers=2 if small else 6,
        num_attention_heads=6 if not small else 2, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    made.config.name_or_path = f"{preset} (random weights)"
    return made, f"{preset} (random weights)"


class PlainLoop:
    """What a user of transformers writes for `rows` texts at once."""

    def __init__(
        self, model: PreTrainedModel, targets: Tensor, e: Tensor, m: Tensor,
        front: Tensor | None = None,  # (P, d) in front of every row
    ) -> None:  # fmt: skip
        self.model, self.targets, self.front = model, targets, front
        self.e, self.m = (t.detach().clone().requires_grad_() for t in (e, m))
        self.optimizer = torch.optim.AdamW([self.e, self.m], lr=0.01, weight_decay=0.01)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Row losses (R,), and the rows' accuracy."""
        rows, length = self.targets.shape
        inputs = torch.cat([self.e, self.m.expand(rows, length - 1, -1)], dim=1)
        inputs = inputs.to(self.model.dtype)
        if self.front is not None:
            inputs = torch.cat([self.front.expand(rows, -1, -1), inputs], dim=1)
        logits = self.model(inputs_embeds=inputs, use_cache=False).logits[:, -length:]
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), self.targets.flatten(), reduction="none"
        )
        correct = (logits.detach().argmax(-1) == self.targets).float().mean(1)
        return loss.view(rows, length).sum(1), correct

    def step(self, attention: str | None = None) -> None:
        """Make one update, with transformers' attention of that name or with the last one set."""
        if attention is not None:
            self.model.set_attn_implementation(attention)
        loss, _ = self.losses()
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()


def engine(lm: FrozenLM, targets: Tensor) -> StepRunner:
    """The engine's runner with all texts in flight and no end to them."""
    groups = make_groups(list(targets.cpu()), [0], None, None)
    rows, length = targets.shape
    recipe = Recipe(margin=1e9, max_steps=10**9, lr=0.01)
    inputs = OneForward(Arrangement.parse("e m*"))
    slots = Slots(Setup(lm, inputs, recipe, "auto", rows), Room(rows, rows, length))
    runner = step_runner(lm, slots, rows)
    with runner.changing():
        slots.admit(groups)
    runner.finish()  # on CUDA that was queued on the runner's stream, and the slots are read next
    return runner


def gate(runner: StepRunner, plain: PlainLoop, dtype: torch.dtype) -> dict[str, float]:
    """How far one step of ours is from the plain loop; SystemExit where that is too far."""
    loss, _ = plain.losses()
    grads = torch.autograd.grad(loss.sum(), (plain.e, plain.m))
    runner.advance(1)
    runner.finish()
    slots = runner.slots
    found, loss = slots.loss[: slots.rows], loss.detach()
    worst = float(((found - loss).abs() / loss.abs()).max())
    gaps = [
        float((bank.grad[: slots.rows] - grad).norm() / grad.norm())
        for bank, grad in zip(slots.banks, grads, strict=True)
    ]
    of_loss, of_grad = TOLERANCES[dtype]
    if not (worst <= of_loss and max(gaps) <= of_grad):
        raise SystemExit(
            f"the step differs from the plain loop: losses by {worst:.2g} (allowed {of_loss:g}), "
            f"gradients by {max(gaps):.2g} (allowed {of_grad:g})"
        )
    return {"loss": worst, "gradient": max(gaps)}


def matrix_weights(model: PreTrainedModel) -> int:
    """P: every matrix a token is multiplied with, the head included, the embedding table not."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    inner = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not embedding)
    return inner + (head.numel() if head is embedding else 0)


def peak_of(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, rate in PEAKS.items():
        if known in name:
            return rate, f"declared dense bf16 peak of {known}"
    return matmul_rate(device, dtype), "a square product measured here"


def flatness(runner: StepRunner, steps: int, seconds: float) -> dict[str, float]:
    """Resident memory and page faults of `steps` further steps (fewer where `seconds` are over)."""
    before, faults, clock = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 0.0
    started, done = time.perf_counter(), 0
    while done < steps and clock < seconds:
        runner.advance(10)
        done += 10
        clock = time.perf_counter() - started
    runner.finish()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {
        "steps": done,
        "resident_bytes": before,
        "grown_bytes": resident() - before,
        "page_faults_per_step": faults / done,
    }


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def warm_up(run: Callable[[], None]) -> None:
    for _ in range(3):
        run()


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes at the peak of the warm-up, what was there before included.

    A CUDA graph keeps its memory in a pool of its own, which counts as reserved and not, once it is
    captured, as allocated. So it is what is reserved beyond what was there.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    warm_up(run)
    return allocated + torch.cuda.max_memory_reserved(device) - before


def measure(
    variants: dict[str, tuple[Callable[[], None], int]],  # what runs, and its text·steps
    device: torch.device,
    rounds: int,
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Text·steps per second of each variant round by round, and on CUDA its peak of memory."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    memory: dict[str, int] = {}
    repeats = {}
    for name, (run, _) in variants.items():
        if device.type == "cuda":
            memory[name] = peak_memory(run, device)
        else:
            warm_up(run)
        repeats[name] = max(1, round(seconds / once(run, device)))
    for _ in range(rounds):
        for name, (run, text_steps) in variants.items():
            count = repeats[name]

            def several(run: Callable[[], None] = run, count: int = count) -> None:
                for _ in range(count):
                    run()

            rates[name].append(text_steps * count / once(several, device))
        # As it is measured, should the rest run out of time.
        print(json.dumps({name: round(each[-1], 1) for name, each in rates.items()}), flush=True)
    return rates, memory


def fastest(rates: dict[str, list[float]], names: Sequence[str]) -> str:
    """Return the name of the variant with the highest median rate."""
    return max(names, key=lambda name: quartiles(rates[name])[1])


@contextmanager
def limited_to(name: str | None) -> Iterator[None]:
    """Let neither side use more than these instructions; None: all that there are.

    oneDNN reads its limit at the first product of a process, so this comes before any.
    """
    if name is None:
        yield
        return
    os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN[name]
    with instruction_set(name):
        yield


def add_instructions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instructions", choices=list(ONEDNN),
        help="all that either side may use; default the best there are",
    )  # fmt: skip


def instructions() -> str:
    """Return what the name of a result's file says of where it ran."""
    return "cuda" if torch.cuda.is_available() else this_machine().instruction_sets[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=list(CUDA), default="stories3m")
    parser.add_argument("--model", help="folder of the model; without it the weights are random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="B; default by preset and device")
    parser.add_argument("--prefix", type=int, default=0, help="P constant tokens in front of e")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="a variant, in each round")
    parser.add_argument("--flat-steps", type=int, default=500, help="0: not looked at")
    parser.add_argument(
        "--out", "--json", type=Path, help="default results/fit-step-PRESET-INSTRUCTIONS.json"
    )
    add_instructions(parser)
    arguments = parser.parse_args()
    sizes = CUDA if torch.device(arguments.device).type == "cuda" else CPU
    if arguments.preset not in sizes:
        parser.error(f"--preset {arguments.preset} is for CUDA; on the CPU: {', '.join(sizes)}")
    with limited_to(arguments.instructions):
        run(arguments, sizes[arguments.preset])


def run(arguments: argparse.Namespace, size: Size) -> None:
    """Measure one preset and write the record."""
    device = torch.device(arguments.device)
    rows, length = arguments.rows or size.rows, size.length
    if device.type == "cpu":
        keep_freed_memory()

    model, name = model_of(arguments.preset, arguments.model, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype = model.dtype
    lm = prototok.load(model, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(lm.vocab_size, (rows, length), generator=generator).to(device)
    bare, front = lm, None
    if arguments.prefix:
        ids = torch.randint(lm.vocab_size, (arguments.prefix,), generator=generator).tolist()
        lm = bare.behind(prefix_of(bare, ids))
        front = lm.prefix_vectors
    runner = engine(lm, targets)
    slots = runner.slots
    e, m = (bank.values[:rows].clone() for bank in slots.banks)
    batched = PlainLoop(model, targets, e, m, front)
    paper = PlainLoop(model, targets[:1], e[:1], m[:1], front)
    agreement = gate(runner, batched, dtype)
    print(f"{name}, {rows} rows of {length} tokens, {dtype}, {device}; agreement {agreement}")

    steps = runner.burst
    runners = [runner]
    variants: dict[str, tuple[Callable[[], None], int]] = {
        "ours": (lambda: runner.advance(steps), rows * steps),
        **{name: (partial(batched.step, name), rows) for name in ATTENTION},
        **{f"paper {name}": (partial(paper.step, name), 1) for name in ATTENTION},
    }
    if front is not None:
        without = engine(bare, targets)
        runners.append(without)
        variants["bare"] = lambda: without.advance(steps), rows * steps
    rates, memory = measure(variants, device, arguments.rounds, arguments.seconds)
    for each in runners:
        each.finish()
    taken = {
        "ours": "ours",
        "batched": fastest(rates, ATTENTION),
        "paper": fastest(rates, [f"paper {name}" for name in ATTENTION]),
    } | ({} if front is None else {"bare": "bare"})
    rates = {name: rates[variant] for name, variant in taken.items()}
    memory = {name: memory[variant] for name, variant in taken.items() if memory}
    flops = 4 * matrix_weights(model) * length  # a text·step
    peak, source = peak_of(device, dtype)
    record = {
        "benchmark": "fit_step",
        **provenance(),
        "preset": arguments.preset, "model": name, "rows": rows, "length": length,
        "dtype": str(dtype).removeprefix("torch."), "device": str(device),
        "agreement": agreement, "attention": taken["batched"],
        "text_steps_per_second": {n: quartiles(r) for n, r in rates.items()},
        "step_ms": {n: 1e3 * (1 if n == "paper" else rows) / quartiles(r)[1]
                    for n, r in rates.items()},
        "ratio": {
            other: quartiles([a / b for a, b in zip(rates["ours"], rates[other], strict=True)])
            for other in ("batched", "paper")
        },
        "flops_per_text_step": flops, "peak_flops": peak, "peak_is": source,
        "mfu": {n: flops * quartiles(r)[1] / peak for n, r in rates.items()},
        "peak_memory_bytes": memory or {
            "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        },
    }  # fmt: skip
    if front is not None:
        record["prefix"] = arguments.prefix
        record["plan"] = lm.plan(rows, length, pair=True).summary()
        record["prefix_cost"] = quartiles(
            [a / b - 1 for a, b in zip(rates["bare"], rates["ours"], strict=True)]
        )
    if device.type == "cpu" and arguments.flat_steps:
        record["flatness"] = flatness(runner, arguments.flat_steps, 60.0)
    for other in ("batched", "paper"):
        low, middle, high = record["ratio"][other]
        print(f"ours / {other}: {middle:.2f} x (quartiles {low:.2f}, {high:.2f})")
    for variant, took in record["step_ms"].items():
        share = record["mfu"][variant]
        print(f"{variant:8} {took:9.2f} ms a step, {100 * share:5.1f} % of the peak ({source})")
    record_of = f"fit-step-{arguments.preset}"
    if front is not None:
        record_of = f"prefix-{arguments.prefix}-{arguments.preset}"
        low, middle, high = (100 * cost for cost in record["prefix_cost"])
        print(
            f"{arguments.prefix} in front: {middle:+.2f} % of a step (quartiles {low:+.2f}, "
            f"{high:+.2f}); {record['plan']}"
        )
    write(record, arguments.out or RESULTS / f"{record_of}-{instructions()}.json")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
