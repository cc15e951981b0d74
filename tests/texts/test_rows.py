"""Rows of data sets: every row has its place, whatever is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prototok.texts.rows import Unreadable, files_of, read_rows


def test_files_are_named_by_path_folder_and_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d/inner").mkdir(parents=True)
    for name in ("d/b.txt", "d/a.jsonl", "d/inner/c.parquet", "d/readme.md", "[x].txt"):
        Path(name).write_text("")
    out = Path("out")
    assert [str(p) for p in files_of(["d"], out)] == ["d/a.jsonl", "d/b.txt", "d/inner/c.parquet"]
    assert [str(p) for p in files_of(["d/*.txt", "d/a.jsonl"], out)] == ["d/b.txt", "d/a.jsonl"]
    assert [str(p) for p in files_of(["[x].txt"], out)] == ["[x].txt"]  # a file, before a pattern
    # What is written of a folder is not read as a part of it when the command goes on.
    assert [str(p) for p in files_of(["d"], Path("d/inner"))] == ["d/a.jsonl", "d/b.txt"]
    for pattern, says in (
        ("none.txt", "names no file"), ("d/*.csv", "names no file"), ("d/readme.md", "ends in"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^source: .*{says}"):
            files_of([pattern], out)


def test_rows_keep_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("One\r\n\nzwei – drei\n\xff\nend".encode("latin-1", "replace"))
    rows = list(read_rows(tmp_path / "a.txt", "text"))
    assert rows[:2] == ["One", ""] and rows[4] == "end" and len(rows) == 5
    assert isinstance(rows[3], Unreadable) and "line 4 of" in rows[3].why
    (tmp_path / "b.jsonl").write_text('{"t": "x"}\n{"u": 1}\n{"t": null}\n[1]\n{"t": [4, 5]}\n')
    found = list(read_rows(tmp_path / "b.jsonl", "t"))
    assert [found[0], found[2], found[4]] == ["x", None, [4, 5]]
    assert isinstance(found[1], Unreadable) and isinstance(found[3], Unreadable)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_of_texts(kind: pa.DataType, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(150)] + ["", None]
    pq.write_table(pa.table({"t": pa.array(texts, kind)}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", "t")) == texts


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16(), 2)]
)
def test_parquet_of_token_ids(kind: pa.DataType, tmp_path: Path) -> None:
    rows = [[1, 2], [3, 4], None]
    pq.write_table(pa.table({"t": pa.array(rows, kind)}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", "t")) == rows


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1.5], "l": [["a"]]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_text(json.dumps({}))
    for name, column, says in (
        ("a.parquet", "t", "has no column 't'"), ("a.parquet", "n", "holds double, not text"),
        ("a.parquet", "l", "holds list.*, not text"), ("b.parquet", "t", "is not Parquet"),
        ("none.txt", "t", "could not be read"), ("none.jsonl", "t", "could not be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^source: .*{says}"):
            list(read_rows(tmp_path / name, column))
