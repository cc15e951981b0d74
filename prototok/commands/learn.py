"""`prototok learn prior | optimizer | encoder`: what fits start from, learned once a model."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from prototok.common.command_line import (
    PREFIX,
    Device,
    Dtype,
    Model,
    front_asked,
    require_positive,
    say,
)
from prototok.common.files import try_file

if TYPE_CHECKING:
    from prototok.fitting.learned.encoder import Encoder, Init
    from prototok.fitting.learned.optimizer import LearnedOptimizer
    from prototok.fitting.prior import Prior
    from prototok.fitting.recipe import Recipe
    from prototok.model.frozen_lm import FrozenLM

    Kept = TypeVar("Kept", Prior, LearnedOptimizer, Encoder)

    Begun = Encoder | LearnedOptimizer | tuple[Encoder, LearnedOptimizer]

app = typer.Typer(
    help="Learn once a model what its fits start from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", "-o", help="A safetensors file.")]
Book = Annotated[Path | None, typer.Option(help="Learn from this text. Default: samples.")]
Lengths = Annotated[str, typer.Option(help="Tokens a text, rising.")]
Steps = Annotated[int, typer.Option(help="Steps of training.")]
Seed = Annotated[int, typer.Option(help="Of weights and windows.")]
Start = Annotated[Path | None, typer.Option(help="A prior of the model.")]
_CHECKPOINT = "Keep the training in this file every minute, and go on from it where it is there."
Checkpoint = Annotated[Path | None, typer.Option(help=_CHECKPOINT)]

_BEGIN = (
    "What training begins with: a prior of the model, an optimizer to go on from, or an encoder "
    "to start at the guess of. Given twice: an encoder and an optimizer."
)
# Of the commands that fit.
INIT = (
    "A file of `prototok learn`: an optimizer with --recipe learned, else a prior or an encoder. "
    "Given twice: an encoder and an optimizer."
)
_CHUNKS = 128  # most tokens of a text of the book


@app.command()
def prior(
    out: Out,
    model: Model = "tiny-llama",
    book: Book = None,
    length: Annotated[int | None, typer.Option(help="Tokens a text; default: what fits.")] = None,
    seeds: Annotated[int, typer.Option(help="Of the noise; kept is what fits best.")] = 4,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Learn where e and m start: for `prototok fit --init`."""
    require_positive(length=length, seeds=seeds)
    text = _text_of(book, out, "prior")
    from prototok.fitting.learn_shared import learn_shared
    from prototok.model.load import load

    lm = load(model, device, dtype)
    cut = length or 16
    whole = _pieces(lm, text, cut, cut, 32)
    if whole == []:
        raise ValueError(f"book: {book} has fewer than {cut} tokens")
    found = learn_shared(
        lm, whole, length=length, seeds=seeds, prefix=front_asked(prefix), progress=True
    )
    found.save(out)
    say(f"a prior of {lm.identity.name} at {found.provenance['length']} tokens; written to {out}")


@app.command()
def optimizer(
    out: Out,
    model: Model = "tiny-llama",
    book: Book = None,
    lengths: Lengths = "8,16",
    steps: Steps = 3000,
    seed: Seed = 0,
    init: Annotated[list[Path] | None, typer.Option(help=_BEGIN)] = None,
    checkpoint: Checkpoint = None,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Train a network that fits in few updates: for `prototok fit --recipe learned --init`."""
    require_positive(steps=steps)
    grid = _grid_of(lengths)
    text = _text_of(book, out, "optimizer")
    from prototok.fitting.learn_optimizer import learn_optimizer
    from prototok.model.load import load

    start, begun = _begin_with(init)
    lm = load(model, device, dtype)
    longest = max(grid[-1], min(_CHUNKS, lm.context or _CHUNKS))
    whole = _pieces(lm, text, longest, grid[-1], None)
    found = learn_optimizer(
        lm, whole, lengths=grid, steps=steps, prior=start, init=begun, seed=seed,
        checkpoint=checkpoint, prefix=front_asked(prefix), progress=True,
    )  # fmt: skip
    found.save(out)
    say(f"an optimiser of {lm.identity.name} at {lengths} tokens; written to {out}")


@app.command()
def encoder(
    out: Out,
    model: Model = "tiny-llama",
    book: Book = None,
    lengths: Lengths = "8",
    steps: Steps = 3000,
    seed: Seed = 0,
    init: Start = None,
    checkpoint: Checkpoint = None,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Train a network that says e and m in one pass: for `prototok encode` and `fit --init`."""
    require_positive(steps=steps)
    grid = _grid_of(lengths)
    text = _text_of(book, out, "encoder")
    from prototok.fitting.learn_encoder import learn_encoder
    from prototok.fitting.prior import Prior
    from prototok.model.load import load

    start = None if init is None else Prior.load(init)
    lm = load(model, device, dtype)
    found = learn_encoder(
        lm, None if text is None else [text], lengths=grid, steps=steps, prior=start, seed=seed,
        checkpoint=checkpoint, prefix=front_asked(prefix), progress=True,
    )  # fmt: skip
    found.save(out)
    say(f"an encoder of {lm.identity.name} at {lengths} tokens; written to {out}")


def _pieces(
    lm: FrozenLM, text: str | None, length: int, least: int, limit: int | None
) -> list[list[int]] | None:  # fmt: skip
    """Cut a book into pieces of `length` tokens; a shorter last one counts from `least` on."""
    from prototok.texts.files import chunks

    if text is None:
        return None
    return [ids for ids in chunks(lm, text, length, limit) if len(ids) >= least]


def start_from(paths: list[Path] | None, recipe: Recipe) -> tuple[Init | None, Recipe]:
    """Read what fits start from; the recipe's name then tells which files, for --resume.

    Raises:
        ValueError: other files than one of a prior, an optimiser or an encoder, or an encoder and
            then an optimiser.
    """
    from prototok.fitting.learned.encoder import Encoder
    from prototok.fitting.learned.optimizer import LearnedOptimizer

    if not paths:
        return None, recipe
    found = [_read(path, recipe) for path in paths]
    digest = "-".join(hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths)
    recipe = dataclasses.replace(recipe, name=f"{recipe.name} from {digest}")
    if len(found) == 1:
        return found[0], recipe
    encoder, optimizer = found[0], found[1]
    if len(found) > 2 or not (
        isinstance(encoder, Encoder) and isinstance(optimizer, LearnedOptimizer)
    ):
        raise ValueError("init: two files are an encoder and, behind it, an optimizer")
    return (encoder, optimizer), recipe


def _begin_with(paths: list[Path] | None) -> tuple[Prior | None, Begun | None]:
    """Read what the training of an optimiser begins with: a prior, or what it goes on from."""
    from prototok.fitting.learned.encoder import Encoder
    from prototok.fitting.learned.optimizer import LearnedOptimizer
    from prototok.fitting.prior import Prior
    from prototok.fitting.recipe import LEARNED
    from prototok.results.tensor_file import form_of

    networks = (Encoder.form[0], LearnedOptimizer.form[0])
    if paths and len(paths) == 1 and form_of(paths[0]) not in networks:
        return _loaded(Prior, paths[0]), None
    found, _ = start_from(paths, LEARNED)
    assert not isinstance(found, Prior)
    return None, found


def _read(path: Path, recipe: Recipe) -> Prior | LearnedOptimizer | Encoder:
    from prototok.fitting.learned.encoder import Encoder
    from prototok.fitting.learned.optimizer import LearnedOptimizer
    from prototok.fitting.prior import Prior
    from prototok.results.tensor_file import form_of

    if form_of(path) == Encoder.form[0]:
        return _loaded(Encoder, path)
    return _loaded(LearnedOptimizer, path) if recipe.learned else _loaded(Prior, path)


def _loaded(kind: type[Kept], path: Path) -> Kept:
    """Load a file of --init; what is wrong with it is said of that option."""
    try:
        return kind.load(path)
    except ValueError as error:
        raise ValueError(f"init: {str(error).removeprefix('path: ')}") from None


def _grid_of(lengths: str) -> tuple[int, ...]:
    try:
        grid = tuple(int(n) for n in lengths.split(","))
    except ValueError:
        raise ValueError(f"lengths: {lengths!r} is not numbers with commas between them") from None
    require_positive(lengths=min(grid))
    return grid


def _text_of(book: Path | None, out: Path, what: str) -> str | None:
    """Return the text of the book; a file that will not do is refused before a model loads.

    `out` may be there where it is `what` is learned: "prior", "optimizer" or "encoder".
    """
    from prototok.results.tensor_file import form_of
    from prototok.texts.files import read_text

    try_file(out, "out", lambda head: form_of(out) == f"prototok.{what}")
    return None if book is None else read_text(book)
