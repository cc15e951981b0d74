"""`prototok fit`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prototok.commands.exactness import exactness, labelled
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
    from prototok.fitting.learned.encoder import Init
    from prototok.fitting.recipe import Recipe
    from prototok.model.frozen_lm import FrozenLM
    from prototok.results.arrangement import Arrangement
    from prototok.results.fit_folder import FitFolder
    from prototok.results.fit_result import FitResult

_OVERWRITE = "Replace an earlier fit in the folder; other files in it stay."


def fit(
    book: Annotated[Path, typer.Argument(help="A plain-text file in UTF-8.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    model: Model = "tiny-llama",
    length: Annotated[int, typer.Option(help="Tokens a chunk.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Fit only this many chunks.")] = None,
    recipe: Annotated[str, typer.Option(help="fast, paper or learned.")] = "fast",
    init: Annotated[list[Path] | None, typer.Option(help=INIT)] = None,
    arrangement: Annotated[str, typer.Option(help="Where e and m stand.")] = "e m*",
    share: Annotated[str | None, typer.Option(help="m or e: one vector for all chunks.")] = None,
    seeds: Annotated[int, typer.Option(help="Initialisations a chunk; the best is shown.")] = 1,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    max_steps: Annotated[int | None, typer.Option(help="Most updates a chunk.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at once.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_OVERWRITE)] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Cut a book into chunks, fit each, and write vectors and measurements to a folder."""
    from prototok.texts.files import read_text

    # All that can be told without a model is told before one is loaded, the quickest first.
    require_positive(
        length=length, limit=limit, seeds=seeds, max_steps=max_steps, batch_size=batch_size
    )
    text = read_text(book)
    from prototok.common.arguments import seed_list
    from prototok.fitting.fast_fit import require_share
    from prototok.fitting.recipe import recipe_of
    from prototok.results.arrangement import Arrangement
    from prototok.results.fit_folder import FitFolder

    layout, settings = Arrangement.parse(arrangement), recipe_of(recipe, max_steps)
    require_share(share, layout)
    start, settings = start_from(init, settings)
    rows = batch_size or "auto"
    request = _Fit(
        length, limit, settings, start, layout, share, seed_list(seeds), front_asked(prefix), rows
    )
    folder = FitFolder(out, resume, overwrite)
    with folder.claimed():
        from prototok.model.load import load

        lm = load(model, device, dtype, revision)
        _fit_to_folder(lm, text, folder, request)


@dataclass(frozen=True)
class _Fit:
    """What `prototok fit` was asked for."""

    length: int
    limit: int | None
    recipe: Recipe
    init: Init | None
    arrangement: Arrangement
    share: str | None
    seeds: list[int]
    prefix: str | None
    batch_size: int | str


def _fit_to_folder(lm: FrozenLM, text: str, folder: FitFolder, asked: _Fit) -> None:
    """Fit the chunks that the folder has not yet, keep each as it ends, and say what came of it."""
    from prototok.fitting.fast_fit import fast_fit, start_of
    from prototok.fitting.front import front_of
    from prototok.results.fit_folder import plan_of
    from prototok.results.fit_result import FitInterrupted
    from prototok.texts.files import chunks, text_difference

    pieces = chunks(lm, text, asked.length, asked.limit)
    where = f"{str(lm.dtype)[6:]} on {lm.device}"
    stored = f", dequantised from {lm.dequantised}" if lm.dequantised else ""
    say(f"{lm.identity.name}: {lm.body.family} ({lm.body.reason}), {where}{stored}")
    recipe = json.dumps(dataclasses.asdict(asked.recipe))
    behind, in_front = front_of(lm, asked.prefix, asked.recipe, start_of(asked.init))
    say(f"in front: {in_front}")
    plan = plan_of(behind, pieces, asked.arrangement.name, asked.share, asked.seeds, recipe)
    floats = len(pieces) * len(asked.seeds) * asked.arrangement.slots * lm.hidden_size
    done = folder.begin(plan, 2 * 4 * floats)
    left = sorted(set(range(len(pieces))) - set(done))
    if done:
        say(f"{len(done)} of {len(pieces)} chunks are done already")
    differs = text_difference(lm, text, pieces)

    whole = None
    try:
        if left:
            result = fast_fit(
                lm, [pieces[i] for i in left], share=asked.share, seeds=asked.seeds,
                arrangement=asked.arrangement.name, recipe=asked.recipe, init=asked.init,
                prefix=asked.prefix, batch_size=asked.batch_size, progress=True,
                on_text=lambda i, result: folder.commit(left[i], labelled(result, differs)),
            )  # fmt: skip
            whole = None if asked.share is None else labelled(result, differs)
    except FitInterrupted:
        kept = folder.interrupt()
        if not kept:
            say("interrupted before the first chunk was fitted; nothing was written")
        else:
            say(
                f"interrupted; {kept} of {len(pieces)} chunks are in {folder.path}, and --resume "
                "goes on from there"
            )
        raise typer.Exit(130) from None
    except OSError as error:
        there = f"{len(folder.done())} of {len(pieces)} chunks are in it"
        raise cannot_go_on(folder.path, error, there) from None
    _summarise(folder.finish(whole), folder)


def _summarise(result: FitResult, folder: FitFolder) -> None:
    best = result.best()
    exact, texts = int(best.exact.sum()), best.tokens.texts
    say(
        f"{texts} chunks, {int(best.tokens.lengths.sum())} tokens, {exact} exact, mean accuracy "
        f"{float(best.accuracy.mean()):.3f}, {float(result.seconds.sum()):.1f} s; written to "
        f"{folder.path}"
    )
    say(exactness(exact, texts, best.tokens))
