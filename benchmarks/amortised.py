"""In how many updates a learned optimiser fits texts that it never saw, against `fast`.

    python benchmarks/amortised.py tiny-neox --lengths 8 --seeds 0 1 2 --folder FOLDER
    python benchmarks/amortised.py MODEL --text valid.txt --lengths 8 16 --folder FOLDER
    python benchmarks/amortised.py tiny-neox --reach 0 --folder FOLDER \\
        --out benchmarks/results/amortised_parts.json    # the gradient alone
    python benchmarks/amortised.py tiny-neox --shipped --train-text NOVELS --folder FOLDER/tiny-neox
    python benchmarks/amortised.py MODEL --text valid.txt --lengths 16 --folder FOLDER \\
        --begin FOLDER/optimizer-8-None-3000-0.safetensors    # go on from that
    python benchmarks/amortised.py tiny-neox --shipped --text stories.txt --folder FOLDER/tiny-neox
    python benchmarks/amortised.py tiny-neox --shipped --random --folder FOLDER/tiny-neox
    python benchmarks/amortised.py MODEL ... --patience 20    # not that of recipe "learned"

Both start from the same prior, end at the margin of `fast`, and count a text as solved when it
comes back whole from a decoding at batch 1, in the model's dtype and in float32. The optimiser
learns from samples of the model; windows of the text that occur in them are left out. With --begin
training goes on from a trained optimiser, or starts half of its texts at the guesses of an encoder,
or both. Samples, prior and optimisers are kept in FOLDER, one folder a model, and made only where
they are not there; a training that was interrupted goes on.
With --shipped they are the networks in the package and FOLDER is that of train_networks.py; windows
of --train-text, which the encoder learned from, are left out as well.
With a --text of its own, or --random ids, a built-in model is tried on what it was not made for.
Times are CPU seconds of everything, the network and the verification included; they are kept only
with --idle, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from readme_tables import RESULTS
from recipes import quantile, rounded
from record import provenance
from torch import Tensor

import prototok
from prototok import Encoder, FitResult, FrozenLM, LearnedOptimizer, Prior
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.recipe import LEARNED
from prototok.fitting.shipped import shipped
from prototok.model.load import BUILT_IN, path_of
from prototok.report.verdict import share_of
from prototok.results.tensor_file import form_of
from prototok.texts.files import read_text


def prior_of(lm: FrozenLM, folder: Path) -> Prior:
    """Return the prior in the package or in the folder; learned where there is none."""
    path = folder / "prior.safetensors"
    if not path.exists():
        (shipped(Prior, lm) or prototok.learn_shared(lm, seeds=8, progress=True)).save(path)
    return Prior.load(path)


def samples_of(lm: FrozenLM, folder: Path, count: int = 512) -> torch.Tensor:
    """Return what is in the folder, else (count, 128) ids that the model made up, to train on."""
    path = folder / "samples.npy"
    if not path.exists():
        np.save(path, own_texts(lm, count, 128, seed=1).numpy())
    return torch.from_numpy(np.load(path))


def read_networks(paths: Iterable[Path]) -> tuple[Encoder | LearnedOptimizer, ...]:
    """Return the encoder or optimiser of each file."""
    return tuple(
        Encoder.load(path) if form_of(path) == Encoder.form[0] else LearnedOptimizer.load(path)
        for path in paths
    )


def training_of(optimizer: LearnedOptimizer) -> dict:
    """What is kept of how an optimiser was trained."""
    made = optimizer.start.provenance
    return {
        "trained": list(map(int, made["lengths"].split(", "))),
        "training_steps": int(made["steps"]),
        "begun": made.get("init"),
    }


def positions_of(network: Encoder | LearnedOptimizer) -> int:
    """Count the positions, rows × tokens, that went forward and backward in its training."""
    made = network.start.provenance
    return int(made["steps"]) * int(made.get("positions", 1024))


def cost_of(optimizer: LearnedOptimizer, begun: Iterable[Encoder | LearnedOptimizer]) -> int | None:
    """Count the positions of training, of all it began with too; None where these are not known."""
    if any("init" in part.start.provenance for part in begun):
        return None
    return positions_of(optimizer) + sum(map(positions_of, begun))


def optimizer_of(
    lm: FrozenLM, prior: Prior, samples: torch.Tensor, seed: int, asked: argparse.Namespace
) -> LearnedOptimizer:
    """Return what was trained with this seed, from the folder where it is there."""
    lengths = "-".join(map(str, asked.train_lengths))
    name = f"optimizer-{lengths}-{asked.reach}-{asked.steps}-{seed}"
    begun = read_networks(asked.begin or [])
    if asked.horizon is not None:
        name += f"-horizon-{asked.horizon}"
    if asked.near is not None:
        name += f"-near-{asked.near:g}"
    if begun:
        name += "-begun"
    path = asked.folder / f"{name}.safetensors"
    if not path.exists():
        start = time.process_time()
        prototok.learn_optimizer(
            lm, samples, lengths=asked.train_lengths, reach=asked.reach, steps=asked.steps,
            positions=asked.positions, horizon=asked.horizon, near=asked.near,
            prior=None if any(isinstance(part, LearnedOptimizer) for part in begun) else prior,
            init=None if not begun else begun[0] if len(begun) == 1 else begun, seed=seed,
            checkpoint=asked.folder / f"{name}.training.safetensors", progress=True,
        ).save(path)  # fmt: skip
        print(f"{name}: {time.process_time() - start:.0f} CPU s of training")
    return LearnedOptimizer.load(path)


def optimizers(
    lm: FrozenLM, prior: Prior, samples: torch.Tensor, asked: argparse.Namespace
) -> dict[str, LearnedOptimizer]:
    """Return what is to be measured, by name."""
    if not asked.shipped:
        return {
            f"learned, seed {seed}": optimizer_of(lm, prior, samples, seed, asked)
            for seed in asked.seeds
        }
    return {"learned, shipped, behind its encoder": shipped_optimizer(lm)}


def shipped_optimizer(lm: FrozenLM) -> LearnedOptimizer:
    """Return the optimiser in the package."""
    found = shipped(LearnedOptimizer, lm)
    if found is None:
        raise SystemExit(f"shipped: none comes with {lm.identity.name}")
    return found


def training_texts(lm: FrozenLM, asked: argparse.Namespace) -> list[Tensor]:
    """Return what windows are cut from: about --train-tokens ids, of each file as many."""
    if asked.train_text is None:
        return list(own_texts(lm, 512, 128, seed=1))
    files = [asked.train_text]
    if asked.train_text.is_dir():
        files = sorted(asked.train_text.glob("*.txt"))
        made = Path(path_of(lm.identity.name)) / "training.json"
        if made.exists():  # from train_builtin.py
            trained_on = json.loads(made.read_text())["train_files"]
            files = [asked.train_text / name for name in trained_on]
    each = asked.train_tokens // len(files)
    return [torch.tensor(lm.encode(read_text(file)[: 8 * each])[:each]) for file in files]


def windows_in(texts: Iterable[Tensor], asked: set[tuple], length: int) -> set[tuple]:
    """Return those of the asked windows of that length that occur in one of the texts."""
    known = set()
    for part in texts:
        row = part.tolist()
        for i in range(len(row) - length + 1):
            window = tuple(row[i : i + length])
            if window in asked:
                known.add(window)
    return known


def unseen(lm: FrozenLM, text: str, texts: Iterable[Tensor], length: int, count: int) -> Tensor:
    """Return windows (count, length) of the text that are in none of `texts`, spread over it."""
    ids = lm.encode(text)
    windows = [tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    known = windows_in(texts, set(windows), length)
    found = [window for window in windows if window not in known]
    if len(found) < count:
        raise SystemExit(f"text: {len(found)} windows of {length} tokens, fewer than {count}")
    return torch.tensor([found[i * len(found) // count] for i in range(count)])


def random_ids(lm: FrozenLM, length: int, count: int) -> Tensor:
    """Return texts (count, length) of ids drawn from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.vocab_size, (count, length), generator=generator)


def other_text(asked: argparse.Namespace) -> str | None:
    """Name what is fitted where it is not of the kind that the model was trained on."""
    if asked.random:
        return "random ids"
    return asked.text.name if asked.text is not None and asked.model in BUILT_IN else None


def cell_of(fit: FitResult, seconds: float) -> dict:
    """What is kept of the fits of one recipe; steps of an unsolved text are None."""
    pairs = zip(fit.steps.flatten().tolist(), fit.exact.flatten().tolist(), strict=True)
    steps = [s if exact else None for s, exact in pairs]
    censored = [math.inf if s is None else s for s in steps]
    quartiles = [quantile(censored, q) for q in (0.25, 0.5, 0.75, 0.95)]
    solved = sum(s is not None for s in steps)
    return {
        "texts": len(steps),
        "solved": solved,
        "solved_interval": rounded(share_of(solved, len(steps))),
        "steps_quartiles": [None if math.isinf(q) else q for q in quartiles[:3]],
        "steps_95": None if math.isinf(quartiles[3]) else quartiles[3],
        "steps": steps,
        "cpu_ms": 1000 * seconds / len(steps),
    }


def key_of(cell: dict) -> str:
    """Name a cell by all that makes it another one."""
    key = f"{cell['model']} {cell['length']} {cell['recipe']}"
    if "trained" in cell:
        key += f", {cell['training_steps']} steps on {cell['trained']}"
        for name in ("reach", "horizon", "near", "patience"):
            if cell.get(name) is not None:
                key += f", {name} {cell[name]}"
        if cell["begun"]:
            key += f", begun with {cell['begun']}"
    return key + ("" if cell["text"] is None else f", on {cell['text']}")


def save(record: dict, path: Path) -> None:
    """Write the record, a cell a line."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in record["cells"].items()]
    path.write_text('{"cells": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def opened(asked: argparse.Namespace) -> tuple[FrozenLM, str, Prior]:
    """Return the model, text that it was not trained on, and the prior."""
    asked.train_lengths = asked.train_lengths or asked.lengths
    asked.folder.mkdir(parents=True, exist_ok=True)
    lm = prototok.load(asked.model)
    if asked.text is None and lm.identity.name not in BUILT_IN:
        raise SystemExit("text: name a file with text that the model was not trained on")
    text = read_text(asked.text or Path(path_of(lm.identity.name)) / "held_out.txt")
    return lm, text, prior_of(lm, asked.folder)


def record_at(path: Path) -> dict:
    """Read what was measured before, to add to it."""
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


def arguments() -> argparse.ArgumentParser:
    """What is asked of a network's training and of what it is tried on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="default: a built-in model's held-out text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8])
    parser.add_argument("--train-lengths", type=int, nargs="+", help="default: --lengths")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--train-text", type=Path, help="an encoder's; default: samples")
    parser.add_argument("--train-tokens", type=int, default=2_000_000)
    return parser


def main() -> None:
    parser = arguments()
    parser.description = __doc__.split("\n")[0]
    parser.add_argument("--reach", type=int)
    parser.add_argument("--positions", type=int)
    parser.add_argument("--horizon", type=int)
    parser.add_argument("--near", type=float, help="hold the network near where fits start")
    parser.add_argument("--patience", type=int, help="updates without progress of the network")
    parser.add_argument("--samples", type=int, default=512, help="made where FOLDER has none")
    parser.add_argument("--random", action="store_true", help="fit random ids")
    parser.add_argument("--shipped", action="store_true", help="the one in the package")
    parser.add_argument("--begin", type=Path, nargs="+", help="files that training begins with")
    parser.add_argument("--idle", action="store_true", help="keep times")
    parser.add_argument("--out", type=Path, default=RESULTS / "amortised.json",
                        help="cells are added to what is there")  # fmt: skip
    asked = parser.parse_args()
    lm, text, prior = opened(asked)
    samples = samples_of(lm, asked.folder, asked.samples)
    model = Path(asked.model).name
    record = record_at(asked.out)
    learned, begun = optimizers(lm, prior, samples, asked), read_networks(asked.begin or [])
    known = [*samples, *([] if asked.train_text is None else training_texts(lm, asked))]
    other = other_text(asked)
    recipe = LEARNED if asked.patience is None else replace(LEARNED, learned=asked.patience)
    runs: dict[str, dict] = {"fast": {"init": prior}} | {
        # Those in the package are what it takes by itself, an encoder where the text is short.
        name: {"recipe": recipe, "init": None if asked.shipped else optimizer}
        for name, optimizer in learned.items()
    }
    for length in asked.lengths:
        if asked.random:
            targets = random_ids(lm, length, asked.count)
        else:
            targets = unseen(lm, text, known, length, asked.count)
        for name, options in runs.items():
            prototok.fast_fit(lm, targets[:8], progress=False, **options)  # warm
            start = time.process_time()
            fit = prototok.fast_fit(lm, targets, progress=False, **options)
            cell = cell_of(fit, time.process_time() - start)
            print(f"{model}, N = {length}, {name}: {cell['solved']}/{cell['texts']} solved, steps "
                  f"{cell['steps_quartiles']}, 95 % {cell['steps_95']}, "
                  f"{cell['cpu_ms']:.2f} CPU ms a text")  # fmt: skip
            if not asked.idle:
                del cell["cpu_ms"]
            if name in learned:
                cell |= training_of(learned[name]) | {
                    "reach": asked.reach, "horizon": asked.horizon, "near": asked.near,
                    "patience": asked.patience,
                    "training_positions": None if asked.shipped else cost_of(learned[name], begun),
                }  # fmt: skip
            cell |= {"model": model, "length": length, "recipe": name, "text": other}
            record["cells"][key_of(cell)] = cell | provenance()
            save(record, asked.out)
    print(f"\nwritten to {asked.out}")


if __name__ == "__main__":
    main()
