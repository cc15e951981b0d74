"""Texts are read as they are, and what a tokenizer does not give back is said."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import prototok
from prototok import FitResult
from prototok.cli import main
from prototok.texts.files import chunks, read_text, text_difference
from support import small_llama


@pytest.fixture
def crlf_lm(tmp_path: Path) -> prototok.FrozenLM:
    """A model whose tokenizer reads CRLF as LF and has `</s>` as a token of its own."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({a: i for i, a in enumerate(sorted(letters))}, []))
    tokenizer.normalizer = normalizers.Replace("\r\n", "\n")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path / "model"
    small_llama(vocab_size=260).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return prototok.load(folder, device="cpu", dtype="float32")


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def test_line_ends_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "crlf.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(path) == "one\r\ntwo\rthree\n"


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_text(tmp_path)


def test_what_the_tokens_do_not_give_back_is_found(crlf_lm: prototok.FrozenLM) -> None:
    def of(text: str, limit: int | None = None) -> str | None:
        return text_difference(crlf_lm, text, chunks(crlf_lm, text, 2, limit))

    assert of("plain text\n") is None
    assert of("a\r\nb") == r"from character 1 on, '\r\nb' reads '\nb'"
    assert of("a\r\nb, and so on", limit=1) == r"from character 1 on, '\r' reads '\n'"
    assert of("abé, in the middle of a character", limit=None) is None
    # Three bytes of “abé”: the last character is half there.
    assert text_difference(crlf_lm, "abé", [crlf_lm.encode("abé")[:3]]) is None


def test_fit_and_decode_tell_exact_tokens_from_exact_text(
    crlf_lm: prototok.FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_bytes(b"a\r\nb")
    assert cli("fit", "book.txt", "-o", "F", "--model", "model", "--length", "1") == 0
    fit = FitResult.load("F")
    exact = f"tokens exact: {int(fit.exact.sum())} of 3 chunks; text exact: no, from character 1"
    assert exact in capsys.readouterr().err
    assert cli("decode", "F", "--model", "model") == 0
    assert exact in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_decode_prints_on_any_terminal_and_writes_exact_bytes(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    book = "\r\n“Ω”\n".encode()
    Path("book.txt").write_bytes(book)
    assert cli("fit", "book.txt", "-o", "F", "--length", "1", "--device", "cpu") == 0
    assert bool(FitResult.load("F").exact.all())
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding=encoding, newline="")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        assert cli("decode", "F", "--device", "cpu") == 0
        terminal.flush()
    assert raw.getvalue() == book.decode().encode(encoding, errors="replace") + b"\n"
    assert f"{encoding} has not all of these characters" in capsys.readouterr().err
    assert cli("decode", "F", "--device", "cpu", "--out", "back.txt") == 0
    assert Path("back.txt").read_bytes() == book
    assert cli("decode", "F", "--device", "cpu", "--out", "book.txt") == 2
    assert "book.txt is there and no file that prototok may replace" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["F", "back.txt", "book.txt"]
