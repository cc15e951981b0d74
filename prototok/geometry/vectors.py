"""Single solutions seen from the vocabulary: norms, nearest embeddings, principal components.

Letters: R rows, d hidden size, V vocabulary, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.common.arguments import is_count, require_seed
from prototok.common.shown import shapes
from prototok.geometry.distances import cosine_distances
from prototok.model.frozen_lm import FrozenLM, require_frozen


@dataclass(frozen=True, eq=False)
class Norms:
    """Euclidean norms: of each vector, and what those of the vocabulary are.

    vectors     (R,) fp64
    vocabulary  (5,) fp64: least, quartiles, greatest norm of an embedding
    """

    vectors: Tensor
    vocabulary: Tensor

    __repr__ = shapes


def norms(lm: FrozenLM, vectors: Tensor) -> Norms:
    """Measure norms of `vectors` (R, d) beside those of the model's input embeddings."""
    _require_width(lm, vectors)
    table = lm.embedding.double().norm(dim=1).cpu()
    at = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64, device="cpu")
    return Norms(vectors.double().norm(dim=1).cpu(), table.quantile(at))


@dataclass(frozen=True, eq=False)
class Nearest:
    """The k embeddings nearest to each vector: ids (R, k) int64, distance (R, k) fp64, ascending.

    random (R,) fp64 is the distance of the nearest embedding to a random vector of the same norm,
    averaged over 16 draws: what "near" has to be compared with.
    """

    ids: Tensor
    distance: Tensor
    random: Tensor

    __repr__ = shapes


def nearest_tokens(lm: FrozenLM, vectors: Tensor, k: int = 5, seed: int = 0) -> Nearest:
    """Find the vocabulary's embeddings of least cosine distance to each of `vectors` (R, d)."""
    require_frozen(lm)
    _require_width(lm, vectors)
    if not is_count(k) or k > lm.vocab_size:
        raise ValueError(f"k: {k!r} is not an integer in 1 … {lm.vocab_size}")
    require_seed(seed)
    table = lm.embedding.float()
    found = cosine_distances(vectors.to(table.device), table).topk(k, largest=False)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        16, lm.hidden_size, generator=generator, dtype=torch.float32, device="cpu"
    ).to(table.device)
    # A distance of directions does not depend on the norm: one mean serves every row.
    chance = cosine_distances(drawn, table).amin(1).mean().cpu()
    return Nearest(found.indices.cpu(), found.values.cpu(), chance.expand(len(vectors)))


@dataclass(frozen=True, eq=False)
class PCA:
    """Principal components of R vectors.

    coordinates (R, C), components (C, d), mean (d,), explained (C,) share of the variance; fp64
    """

    coordinates: Tensor
    components: Tensor
    mean: Tensor
    explained: Tensor

    __repr__ = shapes


def pca(vectors: Tensor, components: int = 2) -> PCA:
    """Find the leading principal components of `vectors` (R, d).

    The sign of a component is that which makes its largest coordinate positive.
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(f"vectors: shape {tuple(vectors.shape)} is not two rows or more")
    most = min(vectors.shape)
    if not is_count(components) or components > most:
        raise ValueError(f"components: {components!r} is not an integer in 1 … {most}")
    mean = vectors.double().mean(0)
    centred = vectors.double() - mean
    _, size, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[:components]
    largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
    kept = kept * largest.sign()
    total = (size**2).sum()
    explained = (
        size[:components] ** 2 / total
        if total > 0
        else torch.zeros(components, dtype=torch.float64, device="cpu")
    )
    return PCA(centred @ kept.T, kept, mean, explained)


def _require_width(lm: FrozenLM, vectors: Tensor) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != lm.hidden_size:
        raise ValueError(
            f"vectors: shape {tuple(vectors.shape)} is not rows of {lm.hidden_size} numbers"
        )
