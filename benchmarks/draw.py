"""Draw the figures of the committed results again, and build the shipped reports, from the records.

    python benchmarks/draw.py           # write them; nothing is measured
    python benchmarks/draw.py --check   # exit code 1 where a figure is not what its record says

The reports are benchmarks/results/paper-small.html and paper-real.html: the paper's experiments on
the built-in models and on SmolLM2-135M, from the runs in the folders of these names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from recipes import figure as recipes_figure
from record import RESULTS

from prototok.bench.table import figure as bench_figure
from prototok.report.build import build
from prototok.report.results import read

REPORTS = {  # title of each, by its run
    RESULTS / "paper-small": "the paper’s experiments on the built-in models",
    RESULTS / "paper-real": "the paper’s experiments on SmolLM2-135M",
}


def figures() -> Iterator[tuple[Path, str]]:
    """Yield the path of every figure, and what its record says it should be."""
    for path in sorted(RESULTS.glob("bench*.json")):
        yield path.with_suffix(".svg"), bench_figure(json.loads(path.read_text()))
    recipes = json.loads((RESULTS / "recipes.json").read_text())
    yield RESULTS / "recipes.svg", recipes_figure(recipes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, drawn in figures():
        if not check:
            path.write_text(drawn, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != drawn:
            sys.exit(f"{path.name} is not what its record says; run benchmarks/draw.py")
    if not check:
        for run, title in REPORTS.items():
            build(read(run), run.with_suffix(".html"), files=False, title=title)


if __name__ == "__main__":
    main()
