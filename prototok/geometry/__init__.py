"""Geometry of solutions: distances, text distances, paths between them, robustness."""

from prototok.geometry.distances import (
    CLASSES,
    Curve,
    Pairs,
    binned_mean,
    cosine_distances,
    pair_distances,
)
from prototok.geometry.paths import BezierSettings, Paths, connect, interpolate
from prototok.geometry.robustness import (
    FORMATS,
    Withstood,
    decodings,
    noisy,
    perturbations,
    rounded,
    score,
)
from prototok.geometry.text import MINILM, Semantic, semantic_embeddings, tfidf_distances
from prototok.geometry.vectors import PCA, Nearest, Norms, nearest_tokens, norms, pca

__all__ = [
    "CLASSES", "FORMATS", "MINILM", "PCA", "BezierSettings", "Curve", "Nearest", "Norms", "Pairs",
    "Paths", "Semantic", "Withstood", "binned_mean", "connect", "cosine_distances", "decodings",
    "interpolate", "nearest_tokens", "noisy", "norms", "pair_distances", "pca", "perturbations",
    "rounded", "score", "semantic_embeddings", "tfidf_distances",
]  # fmt: skip
