"""`prototok export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prototok.common.command_line import say

if TYPE_CHECKING:
    from prototok.exporting.rows import Exportable

_FIT = "A folder that `prototok fit` wrote, or a file that ProtoTokens or MemFit saved."
_FORMAT = "npz, transformers, peft, llamacpp; of autoregressive vectors vllm and sglang, too."


def export(
    fit: Annotated[Path, typer.Argument(help=_FIT)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    format: Annotated[str, typer.Option(help=_FORMAT)] = "transformers",
) -> None:
    """Write fitted vectors for another tool; docs/elsewhere.md says how each reads them."""
    from prototok.exporting.export import MANIFEST
    from prototok.exporting.export import export as write

    folder = write(_read(fit), out, format)
    say(f"written to {folder}; {folder / MANIFEST} says where each text is read")


def _read(path: Path) -> Exportable:
    """Read fitted vectors of any kind; ValueError where there are none."""
    from prototok.results.fit_result import FitResult
    from prototok.results.mem_fit import MemFit
    from prototok.results.proto_tokens import ProtoTokens
    from prototok.results.tensor_file import form_of

    if path.is_dir() or form_of(path) is None:
        return FitResult.load(path)
    return MemFit.load(path) if form_of(path) == "prototok.mem_fit" else ProtoTokens.load(path)
