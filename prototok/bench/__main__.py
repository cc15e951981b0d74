"""`python -m prototok.bench` is `prototok bench`."""

import typer

from prototok.bench.command import bench
from prototok.common.command_line import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(bench)

run(app, "python -m prototok.bench")
