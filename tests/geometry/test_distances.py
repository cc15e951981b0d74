"""Distances, classes, components and neighbours against scipy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prototok import FrozenLM
from prototok.geometry import (
    CLASSES,
    binned_mean,
    cosine_distances,
    nearest_tokens,
    norms,
    pair_distances,
    pca,
)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_cosine_distances_are_scipys() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    a, b = rows(7, 19), rows(4, 19, 1)
    np.testing.assert_allclose(
        cosine_distances(a, b), distance.cdist(a.double(), b.double(), "cosine"), atol=1e-12
    )
    assert cosine_distances(a).diagonal().abs().max() < 1e-12


def test_a_row_of_zeros_is_at_distance_one() -> None:
    a = torch.cat([rows(2, 5), torch.zeros(1, 5)])
    assert torch.equal(cosine_distances(a)[2], torch.ones(3, dtype=torch.float64))


def test_pairs_fall_into_the_papers_classes() -> None:
    # Two seeds of text 0, then texts 1 (its neighbour) and 2 (of another context).
    pairs = pair_distances(rows(4, 6), texts=[0, 0, 1, 2], contexts=[5, 5, 5, 6])
    columns = (pairs.first.tolist(), pairs.second.tolist(), pairs.kind.tolist())
    kinds = {(i, j): CLASSES[k] for i, j, k in zip(*columns, strict=True)}
    assert kinds == {
        (0, 1): "same text",
        (0, 2): "same context",
        (1, 2): "same context",
        (0, 3): "different context",
        (1, 3): "different context",
        (2, 3): "different context",
    }
    assert torch.equal(pairs.of("same text"), pairs.distance[:1])


def test_a_text_in_two_contexts_is_refused() -> None:
    with pytest.raises(ValueError, match="contexts: text 0 stands in 1 and in 2"):
        pair_distances(rows(2, 3), [0, 0], [1, 2])
    with pytest.raises(ValueError, match="texts: 1 entries for 2 vectors"):
        pair_distances(rows(2, 3), [0], [1, 2])


def test_binned_mean_averages_equal_shares() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    curve = binned_mean(x, 10 * x, bins=3)
    assert curve.x.tolist() == [1.5, 3.5, 5.5]
    assert curve.y.tolist() == [15, 35, 55]
    assert curve.std.tolist() == [5, 5, 5] and curve.count.tolist() == [2, 2, 2]
    tied = binned_mean(torch.tensor([0.2, 1.0, 1.0, 1.0, 1.0]), torch.arange(5.0), bins=4)
    assert tied.x.tolist() == pytest.approx([0.2, 1.0])
    assert tied.y.tolist() == [0, 2.5] and tied.count.tolist() == [1, 4]
    assert len(binned_mean(x[:0], x[:0]).x) == 0
    assert len(binned_mean(x[:2], x[:2], bins=10).x) == 2


def test_pca_is_scikit_learns() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = rows(12, 9) * torch.linspace(3, 0.1, 9)
    ours = pca(x, 3)
    theirs = decomposition.PCA(3, svd_solver="full").fit(x.double().numpy())
    np.testing.assert_allclose(ours.explained, theirs.explained_variance_ratio_, rtol=1e-10)
    signs = np.sign(np.sum(ours.components.numpy() * theirs.components_, axis=1))
    coordinates = theirs.transform(x.double().numpy())
    np.testing.assert_allclose(ours.coordinates, coordinates * signs, atol=1e-10)
    largest = ours.components.abs().argmax(1)
    assert bool((ours.components[torch.arange(3), largest] > 0).all())


def test_nearest_tokens_finds_the_embedding_itself(small_lm: FrozenLM) -> None:
    neighbours = pytest.importorskip("sklearn.neighbors")
    vectors = torch.cat([small_lm.embedding[[3, 50]] * 2.5, rows(3, small_lm.hidden_size)])
    found = nearest_tokens(small_lm, vectors, k=4)
    assert found.ids[:2, 0].tolist() == [3, 50]
    assert float(found.distance[:2, 0].max()) < 1e-6
    table = small_lm.embedding.double().numpy()
    search = neighbours.NearestNeighbors(n_neighbors=4, metric="cosine").fit(table)
    distance, ids = search.kneighbors(vectors.double().numpy())
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.distance, distance, atol=1e-6)
    # A random vector is no nearer than the mean nearest distance of others, give or take.
    assert abs(float(found.distance[2:, 0].mean() - found.random[0])) < 0.15


def test_norms_stand_beside_those_of_the_vocabulary(small_lm: FrozenLM) -> None:
    found = norms(small_lm, small_lm.embedding.float())
    np.testing.assert_allclose(
        found.vocabulary, np.quantile(found.vectors.numpy(), [0, 0.25, 0.5, 0.75, 1]), rtol=1e-12
    )
    with pytest.raises(ValueError, match="vectors: shape"):
        norms(small_lm, rows(2, 5))
