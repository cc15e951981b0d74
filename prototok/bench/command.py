"""`prototok bench`, which is `python -m prototok.bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prototok.common.command_line import SHAPE, Device, Dtype, require_positive, say
from prototok.common.files import try_file

_BENCH_MODEL = "May be given more than once. Default: both built-in models."
_TEXT = "Where the texts come from. Default: a held-out book in the package."
_VLLM = "An interpreter that has vLLM, to time it as well."
_SUMMARY = ("model", "length", "exact", "ratio_batch_1", "ratio_best_batch", "ceiling")
_PROFILE = "Profile steps a … b−1 of the first fit, as a:b; docs/profiling.md says how to read it."
_FIGURE = b"One forward against autoregressive decoding"  # what an earlier figure of ours says
_OUT = "The record; the figure goes beside it."
_WIDE = "Every column; 80 characters have room for eight."
_JSON = "One line of JSON in place of the table."


def bench(
    model: Annotated[list[str] | None, typer.Option(help=_BENCH_MODEL)] = None,
    shape: Annotated[str | None, typer.Option(help=SHAPE)] = None,
    lengths: Annotated[str | None, typer.Option(help="Such as 32,64,128.")] = None,
    texts: Annotated[int, typer.Option(help="Texts to fit at each length.")] = 8,
    text: Annotated[Path | None, typer.Option(help=_TEXT)] = None,
    recipe: Annotated[str, typer.Option(help="fast or paper.")] = "fast",
    profile: Annotated[str | None, typer.Option(help=_PROFILE)] = None,
    vllm_python: Annotated[Path | None, typer.Option(help=_VLLM)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help=_OUT)] = Path("bench.json"),
    wide: Annotated[bool, typer.Option("--wide", help=_WIDE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Fit, verify, and time one forward pass against KV-cached decoding."""
    from prototok.bench.measure import BenchSettings, run_bench
    from prototok.bench.profile import step_range
    from prototok.bench.table import table, write
    from prototok.fitting.recipe import recipe_of
    from prototok.model.load import BUILT_IN

    if shape is not None and model:
        raise ValueError("shape: give a model or a shape, not both")
    require_positive(texts=texts)
    recipe_of(recipe)
    if out.suffix == ".svg":
        raise ValueError(f"out: {out} is the name of the figure, not of the record")
    try_file(out, "out", lambda head: b'"measured_peaks"' in head)
    try_file(out.with_suffix(".svg"), "out", lambda head: _FIGURE in head)
    settings = BenchSettings(
        tuple(model) if model else BUILT_IN, shape, _lengths(lengths), texts, text, recipe,
        device, dtype, None if profile is None else step_range(profile), vllm_python,
    )  # fmt: skip
    record = run_bench(settings, say=say)
    write(record, out)
    if as_json:
        print(json.dumps([{key: case[key] for key in _SUMMARY} for case in record["cases"]]))
    else:
        print(table(record, wide))
    say(f"{record['seconds']:.0f} s; written to {out} and {out.with_suffix('.svg')}")


def _lengths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"lengths: {text!r} is not a list such as 32,64,128") from None
    for length in lengths:
        require_positive(length=length)
    return lengths
