"""`export`: fitted vectors for other tools."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from prototok.common.arguments import hint
from prototok.common.files import try_folder, write_text
from prototok.exporting.formats import FORMATS, UNREADABLE
from prototok.exporting.rows import Exportable, rows_of

__all__ = ["export"]

MANIFEST = "export.json"


def export(fit: Exportable, folder: str | Path, format: str = "transformers") -> Path:
    """Write fitted vectors to a new folder in the format of another tool.

    Every row is a whole input of float32 vectors, the prefix in front. `export.json` says of each
    where its text is read, how many tokens it has, and its target ids where they are known.

    | format | what is written | how it is read |
    |---|---|---|
    | `npz` | inputs.npz, an array a row | by anything |
    | `transformers` | inputs.safetensors and a program that reads it | `inputs_embeds` |
    | `peft` | a prompt-tuning adapter a row, and a program | logits at the virtual tokens |
    | `llamacpp` | a file of raw float32 a row | `llama_batch.embd`, logits everywhere |
    | `vllm` | a request a row; [mem] vectors only | generated behind `prompt_embeds` |
    | `sglang` | a request a row; [mem] vectors only | generated behind `input_embeds` |

    Args:
        fit: of which a FitResult or MemFit gives the best seed of each text, ProtoTokens all rows.
        folder: to write to; it is made, or is there and empty.
        format: see the table.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown format, one that cannot carry these vectors, or a folder in use.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(
            f"format: {format!r} is not one of {', '.join(FORMATS)}" + hint(format, FORMATS)
        )
    made = rows_of(fit)
    why = UNREADABLE.get((format, made.kind))
    if why is not None:
        raise ValueError(f"format: {format!r} cannot carry these vectors: {why}")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} holds something; name a new one")
    with try_folder(folder, "folder"):
        try:
            names = FORMATS[format](made, folder)
            rows = [
                {
                    "name": name,
                    "positions": len(row.inputs),
                    "read_from": row.read_from,
                    "tokens": row.tokens,
                    "ids": row.ids,
                }
                for name, row in zip(names, made.rows, strict=True)
            ]
            model = dataclasses.asdict(made.model)
            manifest = {"format": format, "kind": made.kind, "model": model, "rows": rows}
            write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        except BaseException:
            for path in folder.iterdir():  # it was empty
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
    return folder
