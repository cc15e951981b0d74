"""How much of texts that it never saw an encoder brings back in one pass, and what fits gain by it.

    python benchmarks/encoder.py tiny-neox --train-text FOLDER --folder FOLDER
    python benchmarks/encoder.py MODEL --text valid.txt --train-text train.txt --folder FOLDER
    python benchmarks/encoder.py tiny-neox --train-text FOLDER --lengths 4 8 16 \\
        --train-lengths 4 5 6 7 8 9 10 11 12 13 14 15 16 --folder FOLDER
    python benchmarks/encoder.py tiny-neox --train-text FOLDER --folder FOLDER \\
        --optimizer shipped --samples train/tiny-neox/samples.npy

The encoder learns from windows of --train-text: a file, or a folder, of which a model that
train_builtin.py made takes the books that it was trained on itself; without it, from samples of the
model. Windows of the held-out text that occur there are left out. A guess is decoded alone, at
batch 1, in the model's dtype and in float32, and the worse of both counts. Fits of the same windows
by `fast`, from the guess and from the prior that the encoder starts from, go on until the margin is
that of `fast`. With --optimizer recipe "learned" fits them too, from the prior and from the guess;
none of them may occur in the --samples that it was trained on. Prior and encoders are kept in
FOLDER, one folder a model, and made only where they are not there; a training that was interrupted
goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from amortised import (
    arguments,
    cell_of,
    opened,
    record_at,
    save,
    shipped_optimizer,
    training_of,
    training_texts,
    unseen,
    windows_in,
)
from readme_tables import RESULTS
from recipes import rounded
from record import provenance
from torch import Tensor

import prototok
from prototok import Encoder, FitResult, FrozenLM, LearnedOptimizer, Prior
from prototok.fitting.learned.encoder import Init
from prototok.report.verdict import share_of


def encoder_of(
    lm: FrozenLM, prior: Prior, texts: list[Tensor], seed: int, asked: argparse.Namespace
) -> Encoder:
    """Return what was trained with this seed, from the folder where it is there."""
    lengths = "-".join(map(str, asked.train_lengths))
    name = f"encoder-{lengths}-{asked.steps}-{seed}"
    if asked.train_text is None:
        name += "-samples"
    path = asked.folder / f"{name}.safetensors"
    if not path.exists():
        start = time.process_time()
        prototok.learn_encoder(
            lm, texts, lengths=asked.train_lengths, steps=asked.steps, prior=prior, seed=seed,
            checkpoint=asked.folder / f"{name}.training.safetensors", progress=True,
        ).save(path)  # fmt: skip
        print(f"{name}: {time.process_time() - start:.0f} CPU s of training")
    return Encoder.load(path)


def guess_of(fit: FitResult) -> dict:
    """What is kept of guesses; tokens of a text go together, so the interval is over texts."""
    shares = fit.accuracy[:, 0].double()
    mean, half = float(shares.mean()), float(1.96 * shares.std() / len(shares) ** 0.5)
    exact = int(fit.exact.sum())
    return {
        "texts": len(shares),
        "right": round(mean, 4),
        "right_interval": [round(mean - half, 3), round(mean + half, 3)],
        "exact": exact,
        "exact_interval": rounded(share_of(exact, len(shares))),
    }


def fitted(lm: FrozenLM, targets: Tensor, **options: object) -> dict:
    """What is kept of fits, times left out."""
    cell = cell_of(prototok.fast_fit(lm, targets, progress=False, **options), 0.0)
    del cell["cpu_ms"]
    return cell


def fits(
    lm: FrozenLM, targets: Tensor, name: str, start: Prior | Encoder, learned: Init | None
) -> dict[str, dict]:
    """Fit from `start`, of that name, by `fast`, and by "learned" where its init is given."""
    found = {f"fast from the {name}": fitted(lm, targets, init=start)}
    if learned is not None:
        found[f"learned from the {name}"] = fitted(lm, targets, recipe="learned", init=learned)
    return found


def optimizer_of(asked: argparse.Namespace, lm: FrozenLM) -> LearnedOptimizer | None:
    """Return what --optimizer names."""
    if asked.optimizer is None:
        return None
    if asked.samples is None:
        raise SystemExit("samples: name those that the optimiser was trained on")
    if asked.optimizer == "shipped":
        return shipped_optimizer(lm)
    return LearnedOptimizer.load(asked.optimizer)


def main() -> None:
    parser = arguments()
    parser.description = __doc__.split("\n")[0]
    parser.add_argument("--optimizer", help="a file, or 'shipped' for the one in the package")
    parser.add_argument("--samples", type=Path, help="what that was trained on")
    asked = parser.parse_args()
    lm, text, prior = opened(asked)
    optimizer = optimizer_of(asked, lm)
    texts = training_texts(lm, asked)
    encoders = {seed: encoder_of(lm, prior, texts, seed, asked) for seed in asked.seeds}
    model = Path(asked.model).name
    path = RESULTS / "encoder.json"
    record = record_at(path)
    samples = [] if optimizer is None else torch.from_numpy(np.load(asked.samples))
    for length in asked.lengths:
        targets = unseen(lm, text, texts, length, asked.count)
        if known := windows_in(samples, set(map(tuple, targets.tolist())), length):
            raise SystemExit(f"samples: {len(known)} of the windows occur in {asked.samples}")
        from_prior = fits(lm, targets, "prior", prior, optimizer)
        for seed, encoder in encoders.items():
            cell = guess_of(prototok.encode(lm, targets, encoder, progress=False))
            both = None if optimizer is None else (encoder, optimizer)
            cell |= from_prior | fits(lm, targets, "encoder", encoder, both)
            if optimizer is not None:
                cell["optimizer"] = training_of(optimizer)
            cell |= {
                "model": model, "length": length, "seed": seed, "trained": asked.train_lengths,
                "training_steps": asked.steps, "training_tokens": sum(map(len, texts)),
                "training_text": "samples" if asked.train_text is None else "text",
            }  # fmt: skip
            steps = {k: v["steps_quartiles"] for k, v in cell.items() if " from the " in k}
            print(
                f"{model}, N = {length}, seed {seed}: {cell['right']:.3f} of tokens right, "
                f"{cell['exact']}/{cell['texts']} exact; steps {steps}"
            )
            trained = f"trained on {asked.train_lengths}, {cell['training_text']}"
            key = f"{model} {length}, {trained}, {asked.steps} steps, seed {seed}"
            if optimizer is not None and cell["optimizer"]["begun"]:
                key += f", optimizer begun with {cell['optimizer']['begun']}"
            record["cells"][key] = cell | provenance()
            save(record, path)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
