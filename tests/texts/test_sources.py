"""Texts from every kind of source: cut where they should be, and the same every time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prototok import FrozenLM
from prototok.model.sample import sample
from prototok.texts.sources import (
    Source,
    chunks_of_sentences,
    continuations,
    documents,
    passages,
    target_texts,
    word_list,
)

SENTENCES = [f"Sentence number {i} of “this” book has nine words. " for i in range(400)]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        text = "".join(s.replace("book", f"book {name}") for s in SENTENCES)
        (folder / name / "text.txt").write_text(text)
    return folder


def test_chunks_are_runs_of_whole_sentences_halved() -> None:
    text = "".join(SENTENCES)
    found = list(chunks_of_sentences(text, (90, 180), "0"))
    assert " ".join(part for chunk in found for part in chunk) in text.replace("\n", " ")
    for context, target in found:
        words = len((context + " " + target).split())
        assert 90 <= words < 180 + 9
        assert target.startswith("Sentence") and target.endswith(".")
        before, after = context.count("Sentence"), target.count("Sentence")
        assert after - before in (0, 1)
    assert found == list(chunks_of_sentences(text, (90, 180), "0"))
    assert found != list(chunks_of_sentences(text, (90, 180), "1"))


def test_titles_and_initials_end_no_sentence() -> None:
    text = "Mrs. Dodd and J. Smith came. “Oh!” said St. Clair… “Yes.”"
    ((context, target),) = chunks_of_sentences(text, (11, 11), "0")
    assert context == "Mrs. Dodd and J. Smith came. “Oh!”"
    assert target == "said St. Clair… “Yes.”"
    # A chunk of one sentence cannot be halved and is dropped.
    assert list(chunks_of_sentences(text, (2, 2), "0")) == [("“Oh!”", "said St. Clair…")]


def test_books_take_turns_and_are_read_when_their_turn_comes(books: Path) -> None:
    source = Source("x", "folder", str(books), words=(90, 180))
    first = list(itertools.islice(passages(source), 6))
    assert len({p.origin.split(",")[0] for p in first[:3]}) == 3
    assert [p.origin.rpartition(" ")[2] for p in first] == ["0"] * 3 + ["1"] * 3
    (books / "c" / "text.txt").write_text("")  # is read only by who comes that far
    (books / "b" / "text.txt").write_text("")
    with pytest.raises(ValueError, match=r"text\.txt is empty"):
        list(passages(source))


def test_targets_have_exactly_n_tokens_and_too_few_are_named(
    books: Path, tiny_lm: FrozenLM
) -> None:
    source = Source("x", "folder", str(books), words=(90, 180))
    found = target_texts(source, tiny_lm.encode, 4, 20)
    assert [t.number for t in found] == [0, 1, 2, 3]
    assert all(len(t.ids) == 20 for t in found)
    assert tiny_lm.decode_ids(found[0].ids).startswith("Sentence number")
    with pytest.raises(ValueError, match=r"x has \d+ texts of 20 tokens, not 4000 \(in chunks of"):
        target_texts(source, tiny_lm.encode, 4000, 20)


def test_random_words_are_of_the_list_and_seeded(tmp_path: Path, tiny_lm: FrozenLM) -> None:
    words = tmp_path / "words.txt"
    words.write_text("the 500\nhouse 300\nvery 20\n\n")
    source = Source.parse(f"random:{words}")
    a, b = target_texts(source, tiny_lm.encode, 2, 9)
    assert a.ids != b.ids and len(a.ids) == len(b.ids) == 9
    assert set(tiny_lm.decode_ids(a.ids).split()) <= {"the", "house", "very"}
    assert target_texts(source, tiny_lm.encode, 2, 9)[1].ids == b.ids
    assert target_texts(source, tiny_lm.encode, 2, 9, seed=1)[1].ids != b.ids
    # A shorter target is a prefix of a longer one, so lengths can be compared.
    assert target_texts(source, tiny_lm.encode, 1, 5)[0].ids == a.ids[:5]
    assert len(word_list(None)) > 500


def test_continuations_follow_their_contexts_and_the_models_distribution(
    tiny_lm: FrozenLM,
) -> None:
    source = Source.parse("generated:held-out")
    found = continuations(source, tiny_lm, 2, 3, 6, seed=4)
    assert [t.context for t in found] == ["Held-out 0"] * 3 + ["Held-out 1"] * 3
    assert all(len(t.ids) == 6 for t in found)
    again = continuations(source, tiny_lm, 2, 3, 6, seed=4)
    assert [t.ids for t in again] == [t.ids for t in found]
    prompt = torch.tensor(tiny_lm.encode("It was a dark and stormy"))[None]
    draws = sample(tiny_lm, prompt.expand(1500, -1), 1, seed=0)[:, 0]
    wanted = tiny_lm.logits(tiny_lm.embed(prompt))[0, -1].float().softmax(-1)
    top = wanted.topk(5)
    seen = torch.bincount(draws, minlength=len(wanted))[top.indices] / len(draws)
    error = (seen - top.values).abs()
    # Four standard deviations of a share over 1500 draws; top-k 50 or T = 0.7 would leave them.
    assert bool((error < 4 * (top.values * (1 - top.values) / 1500).sqrt()).all())
    assert len(set(draws.tolist())) > 100
    with pytest.raises(ValueError, match="context_tokens sets the former"):
        continuations(source, tiny_lm, 1, 1, 4000)


def test_data_sets_are_read_from_parquet_and_json_lines(tmp_path: Path) -> None:
    texts = ["One.", "Two.", "Three."]
    pq.write_table(pa.table({"story": texts, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"story": text}) + "\n" for text in texts)
    (tmp_path / "b.jsonl").write_text(lines)
    assert list(documents(str(tmp_path / "a.parquet"), "story")) == texts
    assert list(documents(str(tmp_path), "story")) == texts * 2
    source = Source.parse(f"Fan=dataset:{tmp_path / 'b.jsonl'}#story")
    assert source.name == "Fan" and source.column == "story"
    assert [p.target for p in passages(source)] == texts


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("folder:nowhere", "there is no folder nowhere"),
        ("folder:.", "has no .txt files"),
        ("dataset:nowhere", "has no .parquet or .jsonl files"),
        ("dataset:bad.parquet", "is not Parquet"),
        ("dataset:good.parquet#body", "has no column 'body' (it has text)"),
        ("dataset:bad.jsonl", "line 2 of bad.jsonl is no JSON with 'text'"),
        ("random:nowhere.txt", "there is no file nowhere.txt"),
    ],
)
def test_bad_sources_are_named(
    spec: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.parquet").write_text("x")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "good.parquet")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"body": "x"}\n')
    with pytest.raises(ValueError) as caught:
        list(itertools.islice(passages(Source.parse(spec)), 9))
    assert says in str(caught.value)
