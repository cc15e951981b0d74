"""Distances between texts: by their words (TF-IDF) and by their meaning (MiniLM).

Letters: T texts, W different words, d size of a sentence embedding.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from prototok.common.shown import shapes

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_WORD = re.compile(r"\w+")
_COLUMNS = 4096  # words whose weights are laid out at once


def tfidf_distances(texts: Sequence[str]) -> Tensor:
    """Return (T, T) fp64 cosine distances of TF-IDF vectors, the paper's token-level distance.

    Word unigrams in lower case, tf · (ln((1 + T) / (1 + df)) + 1), document frequencies over these
    texts. A text without a word is at distance 1 from every other.
    """
    counts = [Counter(_WORD.findall(text.lower())) for text in _strings(texts)]
    frequency = Counter(word for words in counts for word in words)
    column = {word: i for i, word in enumerate(sorted(frequency))}
    idf = {w: math.log((1 + len(counts)) / (1 + df)) + 1 for w, df in frequency.items()}
    size = [math.sqrt(sum((n * idf[w]) ** 2 for w, n in words.items())) for words in counts]
    entries = [
        (column[word], row, n * idf[word] / size[row])
        for row, words in enumerate(counts)
        for word, n in words.items()
    ]
    cosine = torch.zeros(len(counts), len(counts), dtype=torch.float64, device="cpu")
    for start in range(0, len(column), _COLUMNS):  # few of a text's words are not zero
        part = [e for e in entries if start <= e[0] < start + _COLUMNS]
        at = torch.tensor(
            [(row, word - start) for word, row, _ in part], dtype=torch.int64, device="cpu"
        ).T
        block = torch.zeros(len(counts), _COLUMNS, dtype=torch.float64, device="cpu")
        block[at[0], at[1]] = torch.tensor(
            [weight for *_, weight in part], dtype=torch.float64, device="cpu"
        )
        cosine += block @ block.T
    return (1 - cosine).clamp(0, 1).fill_diagonal_(0.0)


@dataclass(frozen=True, eq=False)
class Semantic:
    """Sentence embeddings of T texts.

    vectors    (T, d) fp32, of length 1: 1 − their products are the paper's semantic distances
    truncated  (T,) int64, tokens beyond what the model reads, 0 where it read all of the text
    """

    vectors: Tensor
    truncated: Tensor

    __repr__ = shapes


@torch.no_grad()
def semantic_embeddings(
    texts: Sequence[str], model: str | Path = MINILM, batch_size: int = 32, device: str = "cpu"
) -> Semantic:
    """Average the last hidden states over tokens, scaled to length 1 (the model's own recipe).

    Args:
        texts: strings.
        model: hub id or folder of a sentence-transformers model that pools by the mean.
        batch_size: texts a forward, longest first.
        device: where it runs.

    The model reads as many tokens as its `sentence_bert_config.json` says, 256 for
    all-MiniLM-L6-v2; what lies beyond is reported, not hidden.

    Raises:
        ValueError: no such model.
    """
    texts = _strings(texts)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        encoder: Any = AutoModel.from_pretrained(model, use_safetensors=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"model: {str(model)!r} could not be loaded ({first})") from error
    encoder = encoder.eval().to(device)
    limit = _limit(str(model), encoder.config.max_position_embeddings)
    whole = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    vectors = torch.empty(len(texts), encoder.config.hidden_size, dtype=torch.float32, device="cpu")
    order = sorted(range(len(texts)), key=lambda i: -whole[i])
    for start in range(0, len(texts), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in part], padding=True, truncation=True, max_length=limit,
            return_tensors="pt",
        ).to(device)  # fmt: skip
        hidden = encoder(**batch).last_hidden_state.float()
        weight = batch["attention_mask"][..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        vectors[part] = torch.nn.functional.normalize(mean, dim=1).cpu()
    return Semantic(
        vectors, (torch.tensor(whole, dtype=torch.int64, device="cpu") - limit).clamp(min=0)
    )


def _limit(model: str, positions: int) -> int:
    """Return the tokens that the sentence model was made to read, special ones included."""
    try:
        path = cached_file(model, "sentence_bert_config.json")
    except OSError:
        return positions
    assert path is not None
    return min(positions, int(json.loads(Path(path).read_text())["max_seq_length"]))


def _strings(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts: must be a list of strings")
    if not texts:
        raise ValueError("texts: the list is empty")
    return list(texts)
