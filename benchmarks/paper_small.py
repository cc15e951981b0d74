"""Every experiment of the paper at a size that two CPU cores can do, as one run folder and report.

    python benchmarks/paper_small.py --out run
    python benchmarks/paper_small.py --out run-stories --model ../shared/models/stories3m \
        --source TinyStories=dataset:../shared/corpora/tinystories.jsonl --source random

plans all experiments with the settings below, does them on one worker, measures paths and
robustness, and writes RUN/report.html. It can be stopped and started again. The paper's own
sizes: `prototok sweep plan NAME -o RUN --model … --source …` for each experiment, then
`prototok sweep run RUN`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prototok.geometry.paths import BezierSettings
from prototok.report.build import build
from prototok.report.measure import measure
from prototok.report.results import read
from prototok.sweep.experiments import plan, settings_of
from prototok.sweep.local import LocalSettings, run_local
from prototok.sweep.lots import to_do
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.settings import Settings
from prototok.texts.sources import Source

# Figure 2 shares one-forward fits with Table 3; [mem] vectors hold less, so it starts below.
_QUICK = {"changes": {"max_steps": 400}}
_CAPACITY = {**_QUICK, "lengths": (4, 8, 16), "texts": 3}
_CLOUD = {**_QUICK, "contexts": 5, "continuations": 4, "seeds": 4, "lengths": (8,)}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "figure4": _CLOUD,
    "figure5": _CLOUD,
    "figure6": {**_QUICK, "texts": 3, "seeds": 3, "lengths": (8,), "share": ("m", None)},
    "table1": {**_QUICK, "lengths": (1, 2, 4, 8, 16), "texts": 4},
    "table3": _CAPACITY,
    "figure2": {**_CAPACITY, "lengths": (2, 3, 4, 6, 8, 16)},
    "table2": {**_QUICK, "lengths": (8,), "texts": 8, "seeds": 2, "group_sizes": (1, 4, 8)},
    "figure3": {**_QUICK, "lengths": (2, 4, 8, 16), "texts": 3},
    "table4": {**_QUICK, "lengths": (4, 8, 16), "texts": 3},
}
_BOTH_SOURCES = ("table3", "figure2")  # the others take the first


Parts = dict[str, list[Settings]]  # the settings of each experiment: the first, and those beside it


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", action="append", help="default: both built-in models")
    parser.add_argument("--source", action="append", help="default: held-out and random")
    a = parser.parse_args()
    sources = tuple(Source.parse(s) for s in a.source or ("held-out", "random"))
    models = tuple(a.model or ("tiny-llama", "tiny-neox"))
    parts: Parts = {}
    for name, sizes in EXPERIMENTS.items():
        given: dict[str, Any] = {"models": models, **sizes}
        if name in ("figure4", "figure5"):
            of = a.source[0] if a.source else "held-out"
            given["sources"] = (Source.parse(f"generated:{of.rpartition('=')[2]}"),)
        else:
            given["sources"] = sources if name in _BOTH_SOURCES else sources[:1]
        parts[name] = [settings_of(name, "small", None, **given)]
    do(a, parts)


def options(about: str | None) -> argparse.ArgumentParser:
    """Return the options that `do` takes."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--only", help="such as table1,table3")
    parser.add_argument("--stop-after", choices=("plan", "run"), help="leave out what follows")
    return parser


def do(
    a: argparse.Namespace,
    parts: Parts,
    curves: BezierSettings | None = None,
    most_pairs: int | None = None,
) -> None:
    """Plan the experiments into a run folder, fit what is not done, measure, write the report."""
    for name in a.only.split(",") if a.only else parts:
        first, *also = parts[name]
        units, texts = plan(a.out, name, first, also=also)
        print(f"{name}: {units} units of {texts} texts", flush=True)
    run = RunFolder.open(a.out)
    if a.stop_after != "plan":
        run_local(run, to_do(run, None, False), LocalSettings("auto", 1, "auto", 3))
    if a.stop_after is None:
        measure(read(a.out), curves=curves, most_pairs=most_pairs, say=print)
        written = build(read(a.out), a.out / "report.html")
        print(f"written to {written.page}")


if __name__ == "__main__":
    main()
