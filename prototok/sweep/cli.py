"""`prototok sweep plan | run | status | verify | compact`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prototok.common.arguments import hint
from prototok.common.command_line import PREFIX, Device, say
from prototok.common.files import try_folder

if TYPE_CHECKING:
    from prototok.sweep.run_folder import RunFolder

app = typer.Typer(
    help="The paper's experiments as resumable units of work (docs/scaling.md).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Run = Annotated[Path, typer.Argument(help="The run folder.")]

_EXPERIMENT = "table1, table2, table3, table4, figure2, figure3, figure4, figure5 or figure6."
_MODEL = "NAME, NAME@REVISION or random:NAME; may be given more than once."
_SOURCE = (
    "KIND, KIND:PATH or NAME=KIND:PATH, such as held-out, folder:BOOKS, dataset:FILE#COLUMN, "
    "random, random:WORDS or generated:SOURCE; may be given more than once."
)
_PREFIX = f"{PREFIX} May be given more than once, to fit everything with each."
_PRESET = "paper: its settings. small: minutes on two cores, with what is in the package."
_SHARD = "Only units i of n, such as 0/8; every shard may run anywhere, at any time."
_SLURM = "NAME=VALUE for submitit, such as partition=gpu; may be given more than once."


@app.command()
def plan(
    experiment: Annotated[str, typer.Argument(help=_EXPERIMENT)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder; may hold others.")],
    model: Annotated[list[str] | None, typer.Option(help=_MODEL)] = None,
    source: Annotated[list[str] | None, typer.Option(help=_SOURCE)] = None,
    preset: Annotated[str, typer.Option(help=_PRESET)] = "paper",
    prefix: Annotated[list[str] | None, typer.Option(help=_PREFIX)] = None,
    config: Annotated[Path | None, typer.Option(help="YAML that overrides settings.")] = None,
    device: Device = "auto",
) -> None:
    """Expand an experiment to units; planned again, it keeps what is done."""
    from prototok.sweep.experiments import plan as plan_experiment
    from prototok.sweep.experiments import settings_of
    from prototok.sweep.run_folder import RunFolder
    from prototok.texts.sources import Source

    first, *also = [
        settings_of(
            experiment, preset, config,
            models=tuple(model or ()), sources=tuple(Source.parse(s) for s in source or ()),
            prefix=front,
        )
        for front in prefix or (None,)
    ]  # fmt: skip
    with try_folder(out, "out"):  # before models are loaded and texts generated
        units, texts = plan_experiment(out, experiment, first, device, also)
    run = RunFolder.open(out)
    done = len(run.done() & set(run.units()))
    say(f"{experiment}: {units} units of {texts} texts, planned in {out} ({done} already done)")


@app.command()
def run(
    folder: Run,
    launcher: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    shard: Annotated[str | None, typer.Option(help=_SHARD)] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, or Slurm jobs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward.")] = None,
    attempts: Annotated[int, typer.Option(help="Workers a unit may kill.")] = 3,
    retry_failed: Annotated[bool, typer.Option(help="Try failed units again.")] = False,
    slurm: Annotated[list[str] | None, typer.Option(help=_SLURM)] = None,
    device: Device = "auto",
) -> None:
    """Do what is planned and not yet done."""
    from prototok.sweep.files import RunNotWritable, WorkersFailed
    from prototok.sweep.local import LocalSettings, run_local
    from prototok.sweep.lots import to_do
    from prototok.sweep.run_folder import RunFolder

    for name, value in (("workers", workers), ("batch_size", batch_size), ("attempts", attempts)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a positive integer")
    if launcher not in ("local", "ray", "slurm"):
        raise ValueError(
            f"launcher: {launcher!r} is not local, ray or slurm"
            + hint(launcher, ("local", "ray", "slurm"))
        )
    if slurm and launcher != "slurm":
        raise ValueError(f"slurm: given beside the launcher {launcher!r}")
    opened = RunFolder.open(folder)
    units = to_do(opened, shard, retry_failed)
    settings = LocalSettings(device, workers, batch_size or "auto", attempts)
    if units:
        with try_folder(opened.path / "tmp", "run"):  # before workers start
            pass
    try:
        if not units:
            pass
        elif launcher == "ray":
            from prototok.sweep.ray import run_ray

            run_ray(opened, units, settings)
        elif launcher == "slurm":
            from prototok.sweep.slurm import run_slurm

            if shard is not None:
                raise ValueError("shard: the slurm launcher makes shards of its own")
            run_slurm(opened, settings, dict(_pair(text) for text in slurm or ()))
        else:
            run_local(opened, units, settings)
    except KeyboardInterrupt:
        say(f"interrupted; {len(opened.done())} units are done in {folder}")
        raise typer.Exit(130) from None
    except (RunNotWritable, WorkersFailed) as error:
        say(
            f"prototok: {error}; {len(opened.done())} units are done, and running it again goes on "
            "from there"
        )
        raise typer.Exit(3) from None
    mine = {unit.key for unit in units}
    failed = [row for row in opened.failures().to_pylist() if row["key"] in _keys(opened, shard)]
    done = len(mine & opened.done())
    say(f"{done} of {len(mine)} units done now, {len(failed)} failed")
    for row in failed[:5]:
        say(f"  {row['key']}: {row['reason']}")
    if failed:
        raise typer.Exit(3)


@app.command()
def status(folder: Run) -> None:
    """Count what is done, by experiment."""
    from prototok.sweep.run_folder import RunFolder
    from prototok.sweep.status import status as status_of

    print(status_of(RunFolder.open(folder)))


@app.command()
def verify(
    folder: Run,
    sample: Annotated[int, typer.Option(help="Units to decode again; every file is hashed.")] = 32,
    device: Device = "auto",
) -> None:
    """Check every file, and decode a sample again; exit code 3 where something differs."""
    from prototok.sweep.run_folder import RunFolder
    from prototok.sweep.verify import verify as verify_run

    opened = RunFolder.open(folder)
    checked, decoded, problems = verify_run(opened, sample, device)
    for problem in problems:
        print(problem)
    say(f"{checked} units checked, {decoded} decoded again, {len(problems)} problems")
    if problems:
        raise typer.Exit(3)


@app.command()
def compact(folder: Run) -> None:
    """Merge the shards of finished units into one Parquet file an experiment."""
    from prototok.sweep.run_folder import RunFolder

    for name, rows in RunFolder.open(folder).compact().items():
        print(f"{name}: {rows} rows in {folder / 'compacted' / name}.parquet")


def _keys(run: RunFolder, shard: str | None) -> set[str]:
    from prototok.sweep.lots import shard_of

    return {unit.key for unit in shard_of(run.units(), shard)}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"slurm: {text!r} is not NAME=VALUE")
    return name, value
