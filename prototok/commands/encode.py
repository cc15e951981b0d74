"""`prototok encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prototok.commands.exactness import exactness, labelled
from prototok.common.command_line import (
    PREFIX,
    Device,
    Dtype,
    Model,
    front_asked,
    require_positive,
    say,
)

_ENCODER = "A file of `prototok learn encoder`. Default: what a built-in model brings."
_LENGTH = "Tokens a chunk. Default: as many as the encoder takes."


def encode(
    book: Annotated[Path, typer.Argument(help="A plain-text file in UTF-8.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")],
    model: Model = "tiny-llama",
    encoder: Annotated[Path | None, typer.Option(help=_ENCODER)] = None,
    length: Annotated[int | None, typer.Option(help=_LENGTH)] = None,
    limit: Annotated[int | None, typer.Option(help="Encode only this many chunks.")] = None,
    prefix: Annotated[str, typer.Option(help=PREFIX)] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in the folder.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Cut a book into chunks, encode each in one pass, and say how much of it comes back."""
    from prototok.texts.files import chunks, read_text, text_difference

    require_positive(length=length, limit=limit)
    text = read_text(book)
    from prototok.fitting.encode import encode as encode_texts
    from prototok.fitting.encode import encoder_for
    from prototok.fitting.learned.encoder import Encoder
    from prototok.model.load import load
    from prototok.results.fit_folder import FitFolder

    given = None if encoder is None else Encoder.load(encoder)
    with FitFolder(out, overwrite=overwrite).claimed() as folder:
        lm = load(model, device, dtype)
        found = encoder_for(lm, given)
        pieces = chunks(lm, text, length or found.longest, limit)
        result = encode_texts(lm, pieces, found, prefix=front_asked(prefix), progress=True)
        result = labelled(result, text_difference(lm, text, pieces))
        folder.finish(result)
    exact, tokens = int(result.exact.sum()), int(result.tokens.lengths.sum())
    say(
        f"{len(pieces)} chunks, {tokens} tokens, {exact} exact, "
        f"{int(result.correct.sum()) / tokens:.3f} of tokens right; written to {out}"
    )
    say(exactness(exact, len(pieces), result.tokens))
