"""`prototok decode`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prototok.commands.exactness import exactness
from prototok.common.command_line import Device, Dtype, say
from prototok.common.files import try_file, write_text

_DECODED = "A new file for the text, in UTF-8 and exact; nothing is added and nothing is printed."


def decode(
    folder: Annotated[Path, typer.Argument(help="A folder that `prototok fit` wrote.")],
    model: Annotated[str | None, typer.Option(help="Default: the model in the folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=_DECODED)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Print the text back, one forward pass a chunk; stderr names the chunks that are not exact."""
    import torch

    from prototok.decoding.decode import decode as decode_tokens
    from prototok.model.load import load
    from prototok.results.fit_folder import missing_of
    from prototok.results.fit_result import FitResult

    best = FitResult.load(folder).best()
    missing = missing_of(folder, best)
    if out is not None:
        try_file(out, "out", lambda head: not head)
    stored = best.tokens.model
    lm = load(model or stored.name, device, dtype, None if model else stored.revision)
    best.tokens.require_tokenizer(lm)
    rows = decode_tokens(lm, best.tokens)
    found = [row[: len(target)] for row, target in zip(rows, best.targets, strict=True)]
    # All ids at once: a chunk may end in the middle of a character.
    text = lm.decode_ids(torch.cat(found))
    if out is None:
        _print_text(text)
    else:
        write_text(out, text)
    exact = 0
    for i, (ids, target) in enumerate(zip(found, best.targets, strict=True)):
        right = int((ids == target).sum())
        exact += right == len(target)
        if right < len(target):
            say(f"chunk {i}: {right} of {len(target)} tokens right")
    say(f"{exact} of {len(found)} chunks are exact")
    if missing:
        say(f"unfinished: {missing} more chunks are missing, perhaps between these; `prototok fit "
            "--resume` goes on")  # fmt: skip
    say(exactness(exact, len(found), best.tokens, missing))


def _print_text(text: str) -> None:
    """Print a text, and say on stderr what the terminal cannot show of it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # None: stdout is closed
    shown = text.encode(encoding, errors="replace").decode(encoding)
    print(shown)
    if shown != text:
        say(f"{encoding} has not all of these characters; --out writes them as they are")
