"""Train the learned optimisers that come with the built-in models.

    python benchmarks/train_optimizers.py tiny-neox tiny-llama --folder FOLDER

Each learns from samples of its own model, which FOLDER keeps beside the state of the training: what
was interrupted goes on when it is called again. Optimisers are written to OUT/MODEL.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from amortised import samples_of

import prototok
from prototok.fitting.learned.optimizer import FILE
from prototok.model.load import BUILT_IN, path_of

LENGTHS = (8,)
TEXTS = {"tiny-llama": 512, "tiny-neox": 2048}  # of 128 tokens
STEPS = {"tiny-llama": 4000, "tiny-neox": 5000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=BUILT_IN, metavar="MODEL")
    parser.add_argument("--folder", type=Path, required=True, help="samples and checkpoints")
    parser.add_argument("--out", type=Path, default=Path(path_of(BUILT_IN[0])).parent,
                        help="default: the models in the package")  # fmt: skip
    parser.add_argument("--steps", type=int, help="default: of each model its own")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(BUILT_IN):
        parser.error(f"{', '.join(sorted(unknown))}: not built in")
    torch.set_num_threads(1)
    for name in asked.models:
        folder = asked.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        lm = prototok.load(name)
        start = time.process_time()
        trained = prototok.learn_optimizer(
            lm, samples_of(lm, folder, TEXTS[name]), lengths=LENGTHS,
            steps=asked.steps or STEPS[name], checkpoint=folder / "training.safetensors",
            progress=True,
        )  # fmt: skip
        path = asked.out / name / FILE
        trained.save(path)
        size = path.stat().st_size / 1e6
        print(f"{name}: {time.process_time() - start:.0f} CPU s, {size:.1f} MB in {path}")


if __name__ == "__main__":
    main()
