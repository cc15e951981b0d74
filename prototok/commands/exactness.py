"""Tell exact tokens from exact text."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prototok.results.fit_result import FitResult
    from prototok.results.proto_tokens import ProtoTokens

TEXT = "text differs"  # provenance: where the book differs from its tokens; empty: nowhere


def labelled(result: FitResult, differs: str | None) -> FitResult:
    """Have the vectors say where, if anywhere, exact tokens do not give the exact text."""
    origin = result.tokens.provenance | {TEXT: differs or ""}
    tokens = dataclasses.replace(result.tokens, provenance=origin)
    return dataclasses.replace(result, tokens=tokens)


def exactness(exact: int, texts: int, tokens: ProtoTokens, missing: int = 0) -> str:
    """Tell exact tokens from exact text: a tokenizer may not give back what it read."""
    differs = tokens.provenance.get(TEXT)
    if missing:
        text = "no, chunks are missing"
    elif differs is None:
        text = "not known"  # fitted from Python, or by an earlier version
    elif differs:
        text = f"no, {differs}"
    else:
        text = "yes" if exact == texts else "no, tokens are wrong"
    return f"tokens exact: {exact} of {texts} chunks; text exact: {text}"
