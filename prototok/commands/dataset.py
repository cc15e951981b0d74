"""`prototok dataset`: fit the texts of files, however many, into shards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prototok.commands.learn import INIT, start_from
from prototok.common.command_line import (
    PREFIX,
    RESUME,
    Device,
    Dtype,
    Model,
    cannot_go_on,
    front_asked,
    require_positive,
    say,
)

if TYPE_CHECKING:
    from prototok.results.shards import ShardFolder

_SOURCES = (
    "Files, folders or quoted globs: .txt has a text a line, .jsonl and .parquet a column of texts "
    "or token ids."
)


def dataset(
    sources: Annotated[list[str], typer.Argument(help=_SOURCES)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")],
    model: Model = "tiny-llama",
    column: Annotated[str, typer.Option(help="Of .jsonl and .parquet.")] = "text",
    length: Annotated[int | None, typer.Option(help="Tokens a text; shorter: refused.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read only this many texts.")] = None,
    shard: Annotated[int, typer.Option(help="Texts a shard.")] = 4096,
    recipe: Annotated[str, typer.Option(help="fast, paper or learned.")] = "fast",
    init: Annotated[list[Path] | None, typer.Option(help=INIT)] = None,
    arrangement: Annotated[str, typer.Option(help="Where e and m stand.")] = "e m*",
    seeds: Annotated[int, typer.Option(help="Initialisations a text.")] = 1,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    max_steps: Annotated[int | None, typer.Option(help="Most updates a text.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at once.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier shards.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Fit every text of a data set of any size, one row a text, into shards that a kill spares."""
    from prototok.texts.rows import files_of, read_rows

    require_positive(
        length=length, limit=limit, shard=shard, seeds=seeds, max_steps=max_steps,
        batch_size=batch_size,
    )  # fmt: skip
    files = files_of(sources, out)
    _keep_caches_small()
    from prototok.fitting.recipe import recipe_of
    from prototok.results.arrangement import Arrangement
    from prototok.results.shards import ShardFolder

    layout = Arrangement.parse(arrangement).name
    start, settings = start_from(init, recipe_of(recipe, max_steps))
    options = {
        "recipe": settings, "init": start, "arrangement": layout, "seeds": seeds,
        "prefix": front_asked(prefix), "batch_size": batch_size or "auto",
    }  # fmt: skip
    place = ShardFolder(out, resume, overwrite)
    with place.claimed():
        from prototok.model.load import load

        lm = load(model, device, dtype)
        rows = (row for file in files for row in read_rows(file, column))
        _fit(lm, itertools.islice(rows, limit), place, length, shard, options)


def _keep_caches_small() -> None:
    """Let torch's CPU library keep few of the products that it compiled.

    It compiles one for each shape, so for each number of rows in flight, and would hold 1024 of
    them in each of two caches, a gigabyte. Torch reads both names when it loads, which is later.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _fit(
    lm: Any, texts: Iterator[Any], place: ShardFolder, length: int | None, shard: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Fit texts into the folder, and say what came of them."""
    from prototok.fitting.stream import fit_to_shards
    from prototok.results.shards import Shards

    try:
        summary = fit_to_shards(lm, texts, place, length, shard, True, options)
    except KeyboardInterrupt:
        kept = len(place.done())
        goes_on = "--resume goes on from there" if kept else "nothing was written"
        say(f"interrupted; {kept} shards are in {place.path}, and {goes_on}")
        raise typer.Exit(130) from None
    except OSError as error:
        raise cannot_go_on(place.path, error, f"{len(place.done())} shards are in it") from None
    lost = f", {summary.refused} refused" if summary.refused else ""
    lost += f", {summary.failed} failed" if summary.failed else ""
    say(
        f"{summary.texts} texts in {summary.shards} shards, {summary.exact} exact{lost}; written "
        f"to {place.path}"
    )
    if summary.refused:
        number, why = next(Shards(place.path).refused())
        say(f"text {number} was refused ({why}); every reason is in {place.path}/*/shard.json")
