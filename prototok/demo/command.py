"""`prototok demo`."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from prototok.common.command_line import Device, Dtype, Model, say

_PORT = "On this machine. Default: the first free one from 7860."
_BROWSER = "Open the page."


def demo(
    model: Model = "tiny-neox",
    port: Annotated[int | None, typer.Option(help=_PORT)] = None,
    browser: Annotated[bool, typer.Option(help=_BROWSER)] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:  # fmt: skip
    """Serve a page to play with: fit a text, watch it, decode it, walk between two solutions."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("demo: gradio is not installed; pip install 'prototok[demo]'")
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port: {port} is not in 1 … 65535")
    from prototok.demo.page import serve
    from prototok.model.load import load

    lm = load(model, device, dtype)
    if lm.tokenizer is None:
        raise ValueError(f"model: {model} came without a tokenizer, so that no text can be typed")
    blocks = serve(lm, port, browser)
    say(f"serving {blocks.local_url} on this machine alone; Ctrl-C ends it")
    blocks.block_thread()
