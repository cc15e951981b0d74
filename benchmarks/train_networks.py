"""Train the encoders and learned optimisers that come with the built-in models.

    python benchmarks/train_networks.py tiny-neox tiny-llama --train-text NOVELS --folder FOLDER

The encoder learns from windows of the books of NOVELS that the model itself was trained on. The
optimiser learns from samples of the model, first from its prior alone, then with half of the texts
started at guesses of the encoder, then so at several lengths. FOLDER keeps the samples and the
state of each training: what was interrupted goes on when it is called again. Networks are written
to OUT/MODEL.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from amortised import samples_of, training_texts

import prototok
from prototok import Encoder, FrozenLM, LearnedOptimizer
from prototok.model.load import BUILT_IN, path_of

LENGTH, MIXED = 8, (4, 8, 12)
SAMPLES = {"tiny-llama": 512, "tiny-neox": 2048}  # of 128 tokens
# Steps of training: the encoder, the optimiser from the prior, behind the encoder, and at several
# lengths behind it.
STEPS = {"tiny-llama": (9000, 4000, 3000, 0), "tiny-neox": (9000, 5000, 3000, 8000)}


def train(lm: FrozenLM, name: str, asked: argparse.Namespace) -> tuple[Encoder, LearnedOptimizer]:
    """Train both; each training goes on from its checkpoint."""
    folder = asked.folder / name
    of_encoder, from_prior, behind, mixed = asked.steps or STEPS[name]
    common = {"lengths": (LENGTH,), "progress": True}

    def kept(part: str) -> Path:
        print(f"{name}, {part}: {time.process_time():.0f} CPU s so far")
        return folder / f"{part}.training.safetensors"

    encoder = prototok.learn_encoder(
        lm, training_texts(lm, asked), steps=of_encoder, checkpoint=kept("encoder"), **common
    )
    samples = samples_of(lm, folder, SAMPLES[name])
    first = prototok.learn_optimizer(
        lm, samples, steps=from_prior, checkpoint=kept("optimizer"), **common
    )
    second = prototok.learn_optimizer(
        lm, samples, steps=behind, init=(encoder, first), checkpoint=kept("behind"), **common
    )
    if not mixed:
        return encoder, second
    common["lengths"] = MIXED
    return encoder, prototok.learn_optimizer(
        lm, samples, steps=mixed, init=(encoder, second), checkpoint=kept("mixed"), **common
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=BUILT_IN, metavar="MODEL")
    parser.add_argument("--train-text", type=Path, required=True, help="a folder of novels")
    parser.add_argument("--train-tokens", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="samples and checkpoints")
    parser.add_argument("--out", type=Path, default=Path(path_of(BUILT_IN[0])).parent,
                        help="default: the models in the package")  # fmt: skip
    parser.add_argument("--steps", type=int, nargs=4, help="default: of each model its own")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(BUILT_IN):
        parser.error(f"{', '.join(sorted(unknown))}: not built in")
    torch.set_num_threads(1)
    for name in asked.models:
        (asked.folder / name).mkdir(parents=True, exist_ok=True)
        for network in train(prototok.load(name), name, asked):
            path = asked.out / name / network._file
            network.save(path)
            print(f"{path.stat().st_size / 1e6:.1f} MB in {path}")


if __name__ == "__main__":
    main()
