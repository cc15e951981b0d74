"""What the seed of a prior decides: updates of `fast`, and of a network trained from there.

    python benchmarks/priors.py MODEL --text valid.txt --folder FOLDER --seeds 0 1 2 3 4 5 6 7

Each seed gives a joint fit, so a prior. From it `fast` fits windows of --text, as does a network
that was trained for --steps on samples of the model. *tried* is what `learn_shared` compares: the
updates of `fast` on ends of samples, their geometric mean. All seeds learn from the same beginnings
of the same samples. Samples are kept in FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from amortised import cell_of, record_at, samples_of, save, unseen
from readme_tables import RESULTS
from record import provenance

import prototok
from prototok.texts.files import read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="the model was not trained on it")
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=700, help="of a network's training")
    parser.add_argument("--count", type=int, default=256, help="windows")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "priors.json",
                        help="cells are added to what is there")  # fmt: skip
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    lm = prototok.load(asked.model)
    samples = samples_of(lm, asked.folder)
    targets = unseen(lm, read_text(asked.text), samples, asked.length, asked.count)
    model = Path(asked.model).name
    # All at once, for what it says of each; then each alone.
    tried = prototok.learn_shared(lm, length=asked.length, seeds=asked.seeds, progress=True)
    updates = [float(u) for u in tried.provenance["updates from each"].split(", ")]
    record = record_at(asked.out)
    for seed, of in zip(asked.seeds, updates, strict=True):
        prior = prototok.learn_shared(lm, length=asked.length, seeds=[seed], progress=False)
        network = prototok.learn_optimizer(
            lm, samples, lengths=(asked.length,), steps=asked.steps, prior=prior, progress=False
        )
        cell: dict = {"model": model, "length": asked.length, "seed": seed, "tried": of}
        for name, options in (
            ("fast", {"init": prior}), ("learned", {"recipe": "learned", "init": network}),
        ):  # fmt: skip
            cell[name] = cell_of(prototok.fast_fit(lm, targets, progress=False, **options), 0.0)
            del cell[name]["cpu_ms"]
        cell["training_steps"] = asked.steps
        record["cells"][f"{model} {asked.length} seed {seed}"] = cell | provenance()
        save(record, asked.out)
        print(f"{model}, N = {asked.length}, seed {seed}: tried {of}, fast "
              f"{cell['fast']['steps_quartiles']}, learned {cell['learned']['steps_quartiles']}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
