"""In how many updates a learned optimiser fits texts on a real model, against `fast`.

    python benchmarks/get_smollm2.py
    python benchmarks/amortised_real.py --text NOVEL.txt DIARY.txt STORIES.txt \\
        --train-text OTHER.txt ... --stage 8 1200 128 16 --stage 16 1500 256 16 \\
        --lengths 8 16 --folder FOLDER

A stage of training is a length, steps, positions a step and a horizon; each goes on from the one
before, on windows of --train-text, from the gradient alone unless there is a --reach, at the rate
and held as near where fits start as --rates and --nears say of it. Judged are
--count windows of each --text that occur nowhere in the training text. Fits go on until the margin
is that of `fast`, and count as solved where they come back whole from a decoding at batch 1, in the
model's dtype and in float32. `fast` fits them twice: as it is, without a prior, and from the prior
that the network starts from. *right* is the share of right tokens after so many updates, of `fast`
on its way, of the network without AdamW to take over.
On another processor than that of the record, name another --out. Whoever has looked at results
before deciding on a stage judges it on other windows of the same texts: --between.
The prior is learned from 32 pieces of the training text. It and networks are kept in FOLDER, and
made only where they are not there; a stage that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from contextlib import suppress
from pathlib import Path

import torch
from amortised import cell_of, record_at, save, unseen
from get_smollm2 import FOLDER
from readme_tables import RESULTS
from recipes import median_interval, quantile
from record import provenance
from torch import Tensor

import prototok
from prototok import FitInterrupted, FrozenLM, LearnedOptimizer, Prior
from prototok.fitting.fast_fit import FitEvent
from prototok.fitting.recipe import LEARNED
from prototok.texts.files import read_text

_PIECE = 128  # tokens of a training text
_AFTER = (4, 8, 16, 32, 64)  # updates after which tokens are counted
_NEVER = 10**6  # updates without progress


def pieces_of(lm: FrozenLM, files: list[Path]) -> Tensor:
    """Return the files' tokens in pieces (K, 128)."""
    found = []
    for file in files:
        ids = lm.encode(read_text(file))
        found.append(torch.tensor(ids[: len(ids) // _PIECE * _PIECE]).view(-1, _PIECE))
    return torch.cat(found)


def prior_of(lm: FrozenLM, pieces: Tensor, folder: Path) -> Prior:
    """Return the prior in the folder; learned where there is none."""
    path = folder / "prior.safetensors"
    if not path.exists():
        few = pieces[:: len(pieces) // 32][:32]
        prototok.learn_shared(lm, few, length=8, steps=150, seeds=6, progress=True).save(path)
    return Prior.load(path)


def optimizer_of(
    lm: FrozenLM, pieces: Tensor, prior: Prior, asked: argparse.Namespace
) -> tuple[LearnedOptimizer, list[dict]]:
    """Return what all stages end with, and what each was."""
    name, trained, stages = f"optimizer-{asked.reach}", None, []
    if asked.begin is not None:
        name, trained = f"{name}-begun", LearnedOptimizer.load(asked.begin)
    none = [None] * len(asked.stage)
    for (length, steps, positions, horizon), rate, near in zip(
        asked.stage, asked.rates or none, asked.nears or none, strict=True
    ):
        name += f"-{length}x{steps}x{positions}x{horizon}" + (f"x{rate}" if rate else "")
        name += f"-near-{near:g}" if near else ""
        path = asked.folder / f"{name}.safetensors"
        if not path.exists():
            start = time.process_time()
            prototok.learn_optimizer(
                lm, pieces, lengths=(length,), reach=asked.reach, steps=steps, positions=positions,
                horizon=horizon, rate=rate, near=near, prior=None if stages else prior,
                init=trained, checkpoint=asked.folder / f"{name}.training.safetensors",
                progress=True,
            ).save(path)  # fmt: skip
            print(f"{path.name}: {time.process_time() - start:.0f} CPU s of training", flush=True)
        trained = LearnedOptimizer.load(path)
        stages.append(
            {"length": length, "steps": steps, "positions": positions, "horizon": horizon,
             "rate": rate, "near": near}
        )  # fmt: skip
    assert trained is not None
    return trained, stages


def held_out(
    lm: FrozenLM, pieces: Tensor, length: int, asked: argparse.Namespace
) -> list[list[int]]:
    """Return windows of each text that occur in none of the pieces, spread over it."""
    found = [unseen(lm, read_text(file), pieces, length, 2 * asked.count) for file in asked.text]
    return [window for windows in found for window in windows[int(asked.between) :: 2].tolist()]


class Watch:
    """A callback that counts right tokens on the way.

    length  of the texts, tokens; last: updates of all texts after which it ends the fit
    right   (texts, len(_AFTER)) share of right tokens; 1 of a text that was done before
    first   updates after which all tokens of a text were right; None: never
    """

    def __init__(self, texts: int, length: int, last: int | None) -> None:
        self.length, self.last = length, last
        self.right = torch.ones(texts, len(_AFTER), dtype=torch.float64)
        self.first: list[int | None] = [None] * texts

    def __call__(self, event: FitEvent) -> None:
        steps, correct = event.steps.tolist(), event.correct.tolist()
        for row, step, right in zip(event.rows.tolist(), steps, correct, strict=True):
            if step in _AFTER:
                self.right[row, _AFTER.index(step)] = right / self.length
            if right == self.length and self.first[row] is None:
                self.first[row] = step
        if self.last is not None and min(steps) >= self.last:
            raise KeyboardInterrupt

    def means(self) -> dict[str, float]:
        """Return the mean share of right tokens by updates."""
        means = self.right.mean(0).tolist()
        return {str(n): round(mean, 3) for n, mean in zip(_AFTER, means, strict=True)}


def fitted(lm: FrozenLM, texts: list[list[int]], files: list[Path], **options: object) -> dict:
    """What is kept of fits by one recipe, times left out."""
    watch = Watch(len(texts), len(texts[0]), None)
    cell = cell_of(prototok.fast_fit(lm, texts, progress=True, callback=watch, **options), 0.0)
    del cell["cpu_ms"]
    steps = [math.inf if s is None else s for s in cell["steps"]]
    each = len(texts) // len(files)
    of_file = {file.name: steps[i * each : (i + 1) * each] for i, file in enumerate(files)}
    first = [math.inf if s is None else s for s in watch.first]
    return cell | {
        "median_interval": [known(s) for s in median_interval(steps)],
        "by_source": {name: known(quantile(of, 0.5)) for name, of in of_file.items()},
        "first_right": known(quantile(first, 0.5)),
        "right": watch.means(),
    }


def known(steps: float) -> float | None:
    """Return steps as JSON has them: None for infinitely many."""
    return None if math.isinf(steps) else steps


def alone(lm: FrozenLM, texts: list[list[int]], optimizer: LearnedOptimizer) -> dict[str, float]:
    """Return the share of right tokens by updates of the network, with no AdamW to take over."""
    watch = Watch(len(texts), len(texts[0]), _AFTER[-1])
    recipe = dataclasses.replace(LEARNED, learned=_NEVER)
    with suppress(FitInterrupted):
        prototok.fast_fit(
            lm, texts, recipe=recipe, init=optimizer, batch_size=len(texts), progress=False,
            callback=watch,
        )  # fmt: skip
    return watch.means()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(FOLDER), help="folder or hub id")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="to judge on")
    parser.add_argument("--train-text", type=Path, nargs="+", required=True)
    parser.add_argument("--stage", type=int, nargs=4, action="append", required=True,
                        metavar=("N", "STEPS", "POSITIONS", "HORIZON"))  # fmt: skip
    parser.add_argument("--rates", type=float, nargs="+", help="of training, one a stage")
    parser.add_argument("--nears", type=float, nargs="+", help="0 = not held; one a stage")
    parser.add_argument("--reach", type=int, default=0)
    parser.add_argument("--begin", type=Path, help="a network to go on from, at the prior's start")
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="to judge at")
    parser.add_argument("--count", type=int, default=16, help="windows of each text")
    parser.add_argument("--between", action="store_true", help="judge on as many other windows")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "amortised_real.json")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    lm = prototok.load(asked.model)
    pieces = pieces_of(lm, asked.train_text)
    prior = prior_of(lm, pieces, asked.folder)
    optimizer, stages = optimizer_of(lm, pieces, prior, asked)
    model = Path(asked.model).name
    path = asked.out
    record = record_at(path)
    runs: dict[str, dict] = {
        "learned": {"recipe": "learned", "init": optimizer},
        "fast": {},
        "fast from the prior": {"init": prior},
    }
    trained = "; ".join(f"{s['length']} for {s['steps']} steps" for s in stages)
    begun = None if asked.begin is None else asked.begin.stem
    if begun is not None:
        trained += f", begun with {begun}"
    for length in asked.lengths:
        texts = held_out(lm, pieces, length, asked)
        for name, options in runs.items():
            key = f"{model} {length} {name}" + (", other windows" if asked.between else "")
            if name == "learned":
                key += f", trained at {trained}"
            elif key in record["cells"]:
                continue  # the same for every network
            cell = fitted(lm, texts, asked.text, **options)
            if name == "learned":
                cell |= {
                    "stages": stages, "begun": begun, "reach": asked.reach,
                    "training_pieces": len(pieces),
                }  # fmt: skip
                cell["right"] = alone(lm, texts, optimizer)
            cell |= {"model": model, "length": length, "recipe": name, "other": asked.between}
            record["cells"][key] = cell | provenance()
            save(record, path)
            print(f"{key}: {cell['solved']}/{cell['texts']} solved, steps "
                  f"{cell['steps_quartiles']}, median {cell['median_interval']}, right "
                  f"{cell['right']}, by source {cell['by_source']}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
