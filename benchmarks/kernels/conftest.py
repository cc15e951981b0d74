"""Write each measurement as soon as it is made: pytest-benchmark's JSON comes at the very end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measured", type=Path, help="a line of JSON here for each measurement")


@pytest.fixture(autouse=True)
def written_as_measured(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    path, benchmark = request.config.getoption("--measured"), request.node.funcargs.get("benchmark")
    stats = getattr(benchmark, "stats", None)
    if path is None or stats is None:
        return
    line = {
        "name": request.node.name, "median": stats.stats.median, "min": stats.stats.min,
        "rounds": stats.stats.rounds, **benchmark.extra_info,
    }  # fmt: skip
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
