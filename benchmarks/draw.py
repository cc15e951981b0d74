"""Draw the figures of the committed results again, and build the shipped report, from the records.

    python benchmarks/draw.py           # write them; nothing is measured
    python benchmarks/draw.py --check   # exit code 1 where a figure is not what its record says

The report is benchmarks/results/paper-small.html: the paper's experiments on the built-in models,
from the run in benchmarks/results/paper-small/.
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

RUN = RESULTS / "paper-small"
REPORT, TITLE = RUN.with_suffix(".html"), "the paper’s experiments on the built-in models"


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
        build(read(RUN), REPORT, files=False, title=TITLE)


if __name__ == "__main__":
    main()
