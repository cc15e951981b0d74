"""Text from files: a book cut into consecutive chunks of N tokens."""

from __future__ import annotations

from pathlib import Path

from prototok.model.frozen_lm import FrozenLM


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file; ValueError where it is missing, not UTF-8 or empty."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"text: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 ({error.reason} at {error.start})") from None
    if not text.strip():
        raise ValueError(f"text: {path} is empty")
    return text


def chunks(lm: FrozenLM, text: str, length: int, limit: int | None = None) -> list[list[int]]:
    """Cut a text into at most `limit` pieces of `length` tokens, the last one shorter.

    Their ids one after another are those of the text, so decoded chunks joined are the text.
    """
    ids = lm.encode(text)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return pieces[:limit]
