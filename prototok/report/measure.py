"""Measure what a report needs beyond the fits: paths, robustness, neighbours, text embeddings.

Texts of tokens are kept as well, so that a report can be built where the tokenizer is not.

It takes the models, and minutes; so it is done when asked for and kept in RUN/analysis/, one JSON
file a subject.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch

from prototok.common.files import write_text
from prototok.geometry.paths import BezierSettings, Paths, connect, interpolate
from prototok.geometry.robustness import decodings, perturbations
from prototok.geometry.text import semantic_embeddings
from prototok.geometry.vectors import nearest_tokens, norms, pca
from prototok.model.frozen_lm import FrozenLM
from prototok.report.gallery import tokens_of
from prototok.report.results import Fit, Outcome, Results, Subject
from prototok.results.fit_result import FitResult
from prototok.results.proto_tokens import ProtoTokens
from prototok.sweep.models import load_model

POINTS = 101


def measure(
    results: Results,
    device: str = "auto",
    curves: BezierSettings | None = None,
    most_pairs: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Measure paths (Figure 6), robustness and neighbours with the models; writes RUN/analysis/.

    Args:
        results: the run; vectors are read from its tensors.
        device: where the models run.
        curves: how control points are fitted.
        most_pairs: pairs of solutions a text; None takes all.
        say: is told what is being done.
    """
    curves = curves or BezierSettings()
    paths = []
    one = results.get("figure6")
    for part in _fitted(one) if one else []:
        fits = [f for f in part.fits() if f["exact"]]
        pairs = _pairs(fits, most_pairs)
        if not pairs:
            continue
        lm = _load(part, device)
        fit = fit_of(results, fits, lm)
        say(f"paths: {_title(part)}, {len(pairs)} pairs")
        straight = interpolate(lm, fit, pairs, POINTS)
        curve = connect(lm, fit, pairs, POINTS, curves)
        paths.append(
            _setting(part)
            | {
                "pairs": len(pairs),
                "t": [round(t, 4) for t in straight.t.tolist()],
                "settings": dataclasses.asdict(curves),
                "straight": _path(straight),
                "curve": _path(curve),
            }
        )
    if paths:
        _keep(results, "paths", {"groups": paths})
    solutions = [
        found
        for part in _one_a_subject(results)
        if (found := _solutions(results, part, device, say))
    ]
    if solutions:
        _keep(results, "solutions", {"groups": solutions})
    _keep(results, "tokens", {"texts": _texts_of_tokens(results)})


def measure_semantics(results: Results, model: str, device: str = "auto") -> None:
    """Embed the texts of figures 4 and 5, for their semantic distances."""
    one = results.get("figure4") or results.get("figure5")
    texts = {f"{f['text_id']}-{f['length']}": f["target_text"] for f in one.fits()} if one else {}
    if not texts:
        raise ValueError("semantic: the run has no finished fits of figure4 or figure5")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = semantic_embeddings(list(texts.values()), model, device=device)
    _keep(
        results,
        "semantic",
        {
            "model": model.rstrip("/").rsplit("/", 1)[-1],
            "truncated": int((found.truncated > 0).sum()),
            "vectors": {
                key: [round(x, 6) for x in row.tolist()]
                for key, row in zip(texts, found.vectors, strict=True)
            },
        },
    )


def fit_of(results: Results, fits: list[Fit], lm: FrozenLM) -> FitResult:
    """Put rows of a run into one FitResult of as many texts, each with e and m of its own."""
    opened: dict[str, ProtoTokens] = {}
    for fit in fits:
        if fit["key"] not in opened:
            tokens = results.run.tensors(fit["key"])
            if not isinstance(tokens, ProtoTokens):
                raise ValueError(f"key: {fit['key']} holds no proto-tokens")
            opened[fit["key"]] = tokens
    first = opened[fits[0]["key"]]
    rows = torch.stack([opened[f["key"]].vectors(f["row"]) for f in fits])  # (R, slots, d)
    leading = rows.shape[1] - (first.m is not None)
    e = rows[:, None, 0] if leading == 1 else rows[:, None, :leading]
    tokens = dataclasses.replace(
        first, e=e, m=None if first.m is None else rows[:, None, -1],
        lengths=torch.tensor([f["length"] for f in fits], dtype=torch.int64, device="cpu"),
        seeds=1, share=None, groups=None, model=lm.identity,
    )  # fmt: skip

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([f[name] for f in fits], dtype=dtype, device="cpu")[:, None]

    reals = ("accuracy", "margin", "loss", "seconds", "accuracy_in_batch")
    return FitResult(
        tokens=tokens,
        targets=[torch.tensor(f["target_ids"], dtype=torch.int64, device="cpu") for f in fits],
        exact=column("exact", torch.bool),
        correct=column("correct", torch.int64),
        steps=column("steps", torch.int64),
        seed=column("seed", torch.int64),
        history=None,
        **{name: column(name, torch.float32) for name in reals},
    )


def _fitted(one: Outcome) -> list[Outcome]:
    """Return the one-forward parts of an outcome that have fits, by setting."""
    return [part for part in one.where(mode="one-forward").by_setting() if part.fits()]


def _one_a_subject(results: Results) -> list[Outcome]:
    """Choose for each subject the setting with the most exact solutions of "e m*"."""
    best: dict[Subject, Outcome] = {}
    for one in results.experiments.values():
        for part in _fitted(one.where(arrangement="e m*")):
            subject = part.work[0].subject
            count = sum(f["exact"] for f in part.fits())
            if count > (sum(f["exact"] for f in best[subject].fits()) if subject in best else 0):
                best[subject] = part
    return list(best.values())


def _solutions(
    results: Results, part: Outcome, device: str, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Measure norms, neighbours, components and robustness of some exact solutions."""
    fits = [f for f in part.fits() if f["exact"]][:64]
    if len(fits) < 2:  # no principal components of one
        return None
    lm = _load(part, device)
    fit = fit_of(results, fits, lm)
    say(f"solutions: {_title(part)}, {len(fits)} of them")
    found: dict[str, Any] = _setting(part) | {"experiment": part.name, "solutions": len(fits)}
    for name, stored in (("e", fit.tokens.e), ("m", fit.tokens.m)):
        if stored is None:
            continue
        vectors = stored.reshape(-1, lm.hidden_size)
        size, near = norms(lm, vectors), nearest_tokens(lm, vectors, k=1)
        found[name] = {
            "norm": [round(x, 3) for x in size.vectors.tolist()],
            "nearest": [round(x, 4) for x in near.distance[:, 0].tolist()],
            "random": round(float(near.random[0]), 4),
        }
        found["vocabulary"] = [round(x, 3) for x in size.vocabulary.tolist()]
    components = pca(fit.tokens.e.reshape(len(fits), -1), 2)
    found["pca"] = {
        "coordinates": [[round(x, 4) for x in row] for row in components.coordinates.tolist()],
        "explained": [round(x, 4) for x in components.explained.tolist()],
        "context": [f["context"] or f["text_id"] for f in fits],
        "text": [f["target_text"] for f in fits],
    }
    found["withstood"] = [
        {
            "what": w.what,
            "setting": w.setting,
            "accuracy": round(float(w.accuracy.mean()), 4),
            "exact": int(w.exact.sum()),
        }
        for w in (*perturbations(lm, fit), *decodings(lm, fit))
    ]
    return found


def _pairs(fits: list[Fit], most: int | None) -> list[tuple[int, int]]:
    """Pair every two rows of one text, at most so many a text."""
    texts: dict[str, list[int]] = {}
    for i, fit in enumerate(fits):
        texts.setdefault(fit["text_id"], []).append(i)
    return [pair for rows in texts.values() for pair in list(combinations(rows, 2))[:most]]


def _path(paths: Paths) -> dict[str, Any]:
    return {
        "accuracy": [[round(x, 4) for x in row] for row in paths.accuracy.tolist()],
        "length_ratio": [round(x, 4) for x in paths.length_ratio.tolist()],
        "straight": [round(x, 4) for x in paths.straight.tolist()],
        "steps": paths.steps.tolist(),
    }


def _texts_of_tokens(results: Results) -> dict[str, dict[str, str]]:
    """Return the text of every id that is wanted or came, by model; none without a tokenizer."""
    wanted: dict[str, set[int]] = {}
    for one in results.experiments.values():
        for fit in one.fits():
            wanted.setdefault(fit["model"], set()).update(fit["target_ids"], fit["decoded_ids"])
    found = {}
    for model, ids in wanted.items():
        text = tokens_of(model)
        if text is not None:
            found[model] = {str(i): text(i) for i in sorted(ids)}
    return found


def _setting(part: Outcome) -> dict[str, Any]:
    """Return what a group is of; a prefix that was left to the recipe is not named."""
    first = part.work[0]
    front = {} if first.prefix == "auto" else {"prefix": first.prefix}
    return {n: getattr(first, n) for n in ("model", "source", "length", "share")} | front


def _title(part: Outcome) -> str:
    return f"{part.work[0].subject.name}, N = {part.work[0].length}"


def _load(part: Outcome, device: str) -> FrozenLM:
    return load_model(part.work[0].model, device, part.fits()[0]["dtype"])


def _keep(results: Results, name: str, found: dict[str, Any]) -> None:
    """Write RUN/analysis/NAME.json whole, and into `results`."""
    folder = results.run.path / "analysis"
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(found, ensure_ascii=False) + "\n")
    results.measured[name] = found
