"""Sources of target texts: books, documents, random words, a model's own continuations."""

from __future__ import annotations

import itertools
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from prototok.common.arguments import hint, is_count
from prototok.model.frozen_lm import FrozenLM
from prototok.model.load import BUILT_IN, path_of
from prototok.model.sample import sample
from prototok.texts.files import read_text
from prototok.texts.rows import Unreadable, read_rows

KINDS = ("held-out", "folder", "dataset", "random", "generated")
_FREQUENT = 100_000  # words of a list that are drawn from
_HELD_OUT_WORDS = (60, 90)
_HELD_OUT_CONTEXT = 24  # tokens
_BOOK_WORDS = (12_000, 25_000)
# A sentence ends with its mark, closing quotes and the space behind; a full stop after a title or
# an initial is none. What is left at the end is one, too.
_SENTENCE = re.compile(
    r".*?(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?…]+[\"'”’»)\]]*(?:\s+|\Z)|.+\Z",
    re.DOTALL,
)

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Source:
    """A source of texts, and the name that results carry.

    Attributes:
        name: of the source, such as "PG-19".
        kind: "held-out" is the book in the package; "folder" has one book a .txt file; "dataset" is
            Parquet or JSON lines, a file, a folder or a hub id; "random" draws words from a list;
            "generated" lets the model continue the contexts of another source.
        path: of the folder, the data set or the list of words (one a line, most frequent first; the
            words of the held-out book where it is None).
        column: of the data set.
        words: fewest and most words of a chunk, whose second half of sentences is the target and
            whose first half is the context; None takes a document from its first word.
        of: the source whose contexts are continued.
        context_tokens: how many tokens of the context the model sees, its last ones.
    """

    name: str
    kind: str
    path: str | None = None
    column: str = "text"
    words: tuple[int, int] | None = None
    of: Source | None = None
    context_tokens: int = 512

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"source: kind {self.kind!r} is not one of {', '.join(KINDS)}"
                + hint(self.kind, KINDS)
            )
        if self.kind in ("folder", "dataset") and not self.path:
            raise ValueError(f"source: {self.kind} needs a path, as in {self.kind}:PATH")
        if self.kind == "generated" and (self.of is None or self.of.kind == "generated"):
            raise ValueError(
                "source: generated needs the source it continues: generated:folder:PATH"
            )
        if not isinstance(self.column, str):
            raise ValueError(f"source: column {self.column!r} is not a name")
        if not is_count(self.context_tokens):
            raise ValueError(
                f"source: context_tokens {self.context_tokens!r} is not a positive integer"
            )
        if self.words is not None and not 2 <= self.words[0] <= self.words[1]:
            raise ValueError(f"source: words {list(self.words)} are not a fewest and a most")

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `[NAME=]KIND[:PATH]`, such as `held-out`, `PG-19=folder:books`.

        A data set's column follows a `#`.
        """
        name, _, spec = text.rpartition("=")
        kind, _, path = spec.partition(":")
        if kind == "generated":
            of = cls.parse(path) if path else None
            label = name or f"{of.name if of else ''} (gen)"
            if of is not None and of.kind == "held-out":
                return cls(label, kind, of=of, context_tokens=_HELD_OUT_CONTEXT)
            return cls(label, kind, of=of)
        column = "text"
        if kind == "dataset" and "#" in path:
            path, _, column = path.rpartition("#")
        words = {"held-out": _HELD_OUT_WORDS, "folder": _BOOK_WORDS}.get(kind)
        default = {"held-out": "Held-out", "random": "Random"}.get(kind, Path(path).stem)
        return cls(name or default, kind, path or None, column, words)


@dataclass(frozen=True)
class Passage:
    """A text before it is tokenised: what is fitted, and what stands before it."""

    target: str
    context: str
    origin: str


@dataclass(frozen=True)
class TargetText:
    """A text of a source, cut to the tokens that were asked for."""

    number: int
    ids: list[int]
    context: str | None
    origin: str


def target_texts(
    source: Source, encode: Encode, count: int, length: int, seed: int = 0
) -> list[TargetText]:
    """Return the first `count` texts of a source that have `length` tokens, cut to those.

    Raises:
        ValueError: the source cannot be read or has fewer such texts.
    """
    found: list[TargetText] = []
    for passage in passages(source, seed):
        ids = encode(passage.target)
        if len(ids) >= length:
            found.append(TargetText(len(found), ids[:length], None, passage.origin))
        if len(found) == count:
            return found
    raise ValueError(
        f"source: {source.name} has {len(found)} texts of {length} tokens, not {count}"
        + ("" if source.words is None else f" (in chunks of {source.words[0]}–{source.words[1]}"
           " words; `words` sets that)")
    )  # fmt: skip


def continuations(
    source: Source, lm: FrozenLM, contexts: int, each: int, length: int, seed: int = 0
) -> list[TargetText]:
    """Sample `each` continuations of `length` tokens of each of the first contexts.

    Sampled by the model itself at temperature 1 with no top-k and no top-p, never ending early (the
    paper's PG-19 (gen)); `context` of the result says which context it continues.
    """
    assert source.of is not None
    kept = source.context_tokens
    if lm.context is not None and kept + length > lm.context:
        raise ValueError(
            f"source: a context of {kept} tokens and {length} more do not fit {lm.identity.name}, "
            f"which has {lm.context} positions; context_tokens sets the former"
        )
    prompts: list[list[int]] = []
    origins = []
    for passage in passages(source.of, seed):
        # What has no context of its own, such as random words, is continued itself.
        ids = lm.encode(passage.context or passage.target)
        if len(ids) >= kept:
            prompts.append(ids[-kept:])
            origins.append(passage.origin)
        if len(prompts) == contexts:
            break
    else:
        raise ValueError(
            f"source: {source.of.name} has {len(prompts)} contexts of {kept} tokens, not {contexts}"
        )
    rows = sample(
        lm,
        torch.tensor(prompts, dtype=torch.int64, device="cpu").repeat_interleave(each, dim=0),
        length,
        seed,
    )
    return [
        TargetText(i, ids, f"{source.of.name} {i // each}", origins[i // each])
        for i, ids in enumerate(rows.tolist())
    ]


def passages(source: Source, seed: int = 0) -> Iterator[Passage]:
    """Yield the texts of a source, the same for the same seed; without end for "random".

    Books take turns, so that the first texts are of many books.
    """
    if source.kind == "held-out":
        text = read_text(Path(path_of(BUILT_IN[0])) / "held_out.txt")
        yield from _cut(text, source.words, seed, "held_out.txt")
    elif source.kind == "folder":
        yield from _books(source, seed)
    elif source.kind == "dataset":
        for number, text in enumerate(documents(str(source.path), source.column)):
            yield from _cut(text, source.words, seed, f"document {number}")
    elif source.kind == "random":
        yield from _random(source.path, seed)
    else:
        raise ValueError(f"source: the texts of {source.name} are made by a model")


def _cut(text: str, words: tuple[int, int] | None, seed: int, name: str) -> Iterator[Passage]:
    if words is None:
        yield Passage(text.strip(), "", name)
        return
    for i, (context, target) in enumerate(chunks_of_sentences(text, words, f"{seed} {name}")):
        yield Passage(target, context, f"{name}, chunk {i}")


def chunks_of_sentences(text: str, words: tuple[int, int], seed: str) -> Iterator[tuple[str, str]]:
    """Cut Kuratov et al.'s chunks: runs of consecutive sentences, as context and target.

    A run is ended by the sentence with which it reaches a number of words drawn from `words`.
    Sentences that are left over at the end are dropped.
    """
    draw = random.Random(seed)
    run: list[str] = []
    count, wanted = 0, draw.randint(*words)
    for sentence in _SENTENCE.findall(text):
        run.append(sentence)
        count += len(sentence.split())
        if count >= wanted:
            half = len(run) // 2
            if half:
                yield "".join(run[:half]).strip(), "".join(run[half:]).strip()
            run, count, wanted = [], 0, draw.randint(*words)


def _books(source: Source, seed: int) -> Iterator[Passage]:
    folder = Path(str(source.path))
    if not folder.is_dir():
        raise ValueError(f"source: there is no folder {folder}")
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise ValueError(f"source: folder {folder} has no .txt files")
    random.Random(seed).shuffle(paths)
    turns = deque(_book(path, folder, source, seed) for path in paths)
    while turns:
        passage = next(turns[0], None)
        if passage is None:
            turns.popleft()
        else:
            yield passage
            turns.rotate(-1)


def _book(path: Path, folder: Path, source: Source, seed: int) -> Iterator[Passage]:
    yield from _cut(read_text(path), source.words, seed, str(path.relative_to(folder)))


def documents(path: str, column: str) -> Iterator[str]:
    """Yield the texts of a data set in Parquet or JSON lines: a file, a folder, or a hub id.

    A hub id is fetched through huggingface_hub, or found in its cache where there is no network.
    """
    place = Path(path)
    if not place.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        from huggingface_hub import snapshot_download

        try:
            kept = ["*.parquet", "*.jsonl"]
            place = Path(snapshot_download(path, repo_type="dataset", allow_patterns=kept))
        except Exception as error:  # the hub's client raises a dozen kinds, some of them httpx's
            first = str(error).strip().split("\n")[0]
            raise ValueError(f"source: no file {path}, nor had from the hub ({first})") from error
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    files = [file for file in files if file.suffix in (".parquet", ".jsonl")]
    if not files:
        raise ValueError(f"source: {path} has no .parquet or .jsonl files")
    for file in files:
        for text in read_rows(file, column):
            if isinstance(text, Unreadable):
                raise ValueError(f"source: {text.why}")
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"source: column {column!r} of {file} holds {type(text).__name__}, not text"
                )
            if text:
                yield text


def _random(path: str | None, seed: int) -> Iterator[Passage]:
    """Draw words alike from the most frequent ones of a list; longer than any target."""
    words = word_list(path)
    for number in itertools.count():
        draw = random.Random(f"{seed} {number}")
        yield Passage(" ".join(draw.choices(words, k=4096)), "", f"random words, seed {seed}")


def word_list(path: str | None) -> list[str]:
    """Return the first field of each line of a list, or the words of the held-out book."""
    if path is None:
        text = read_text(Path(path_of(BUILT_IN[0])) / "held_out.txt").lower()
        return sorted(set(re.findall(r"[a-z]{2,}", text)))
    found = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    return found[:_FREQUENT]
