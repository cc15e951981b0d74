"""Text from files: a book cut into consecutive chunks of N tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prototok.common.arguments import nearest

if TYPE_CHECKING:
    from prototok.model.frozen_lm import FrozenLM


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file; ValueError where it is missing, not UTF-8 or empty.

    Raises:
        ValueError: it is missing, a folder, cannot be read, is not UTF-8, or is empty.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"text: {path} is a folder, not a file")
    if not path.exists():
        around = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, around)
        meant = f"; did you mean {str(path.with_name(near))!r}?" if near else ""
        raise ValueError(f"text: there is no file {path}{meant}")
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"text: {path} could not be read ({error.strerror})") from None
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


def text_difference(lm: FrozenLM, text: str, pieces: Sequence[Sequence[int]]) -> str | None:
    """Say where a text differs from what the tokens of its chunks decode to; None: nowhere.

    A tokenizer may read two characters as one, such as CRLF as LF or a literal `</s>` as a token of
    its own. Exact tokens then do not give the exact text back. Chunks of the beginning alone are
    held against the beginning.
    """
    ids = [token for piece in pieces for token in piece]
    read = lm.decode_ids(ids)
    if len(ids) < len(lm.encode(text)):
        read = read.removesuffix("\ufffd")  # they may end inside a character
        text = text[: len(read)]
    if read == text:
        return None
    pairs = enumerate(zip(text, read, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(read)))
    return f"from character {at} on, {text[at : at + 12]!r} reads {read[at : at + 12]!r}"
