"""A choice of texts with what came back, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prototok.report.results import Fit, Results, Subject
from prototok.sweep.models import tokenizer_of


@dataclass(frozen=True)
class Token:
    """A position: what was wanted, what came, by how much (None where it was not kept)."""

    target: str
    decoded: str
    right: bool
    margin: float | None


@dataclass(frozen=True)
class Exhibit:
    """One fit. `experiment` is a sweep's name; `about` is one line of settings."""

    anchor: str
    experiment: str
    model: str
    source: str
    length: int
    right: int
    margin: float | None
    about: str
    tokens: tuple[Token, ...]

    @property
    def title(self) -> str:
        return f"{self.model} · {self.source} · N = {self.length} · {self.right}/{self.length}"


def gallery(results: Results, most: int = 48) -> list[Exhibit]:
    """Choose at most so many fits: of each kind one exact by the least margin, one that is not.

    A kind is an (experiment, subject, source, mode, share, arrangement, K, N). Where there are more
    kinds than room, they take turns: the longest texts of each experiment first.
    """
    kinds: dict[tuple, list[Fit]] = {}
    for one in results.experiments.values():
        for work in one.work:
            key = (one.name, work.subject, work.source, work.mode, work.share, work.arrangement,
                   work.vectors, work.length)  # fmt: skip
            kinds.setdefault(key, []).extend(work.fits)
    queues: dict[tuple, list[Fit]] = {}
    for key in sorted(kinds, key=lambda k: -k[-1]):
        exact = [f for f in kinds[key] if f["exact"]]
        wrong = [f for f in kinds[key] if not f["exact"]]
        chosen = [min(exact, key=lambda f: f["margin"] or 0.0)] if exact else []
        chosen += [max(wrong, key=lambda f: f["accuracy"])] if wrong else []
        queues.setdefault(key[:3], []).extend(chosen)
    found: dict[str, Exhibit] = {}
    while len(found) < most and any(queues.values()):
        for (experiment, subject, _), queue in queues.items():
            if queue and len(found) < most:
                pieces = _pieces(subject.model, results.measured)
                shown = _exhibit(experiment, subject, pieces, queue.pop(0))
                found.setdefault(shown.anchor, shown)
    return sorted(found.values(), key=lambda x: (x.model, x.source, x.experiment, x.length))


def _exhibit(experiment: str, subject: Subject, pieces: Callable[[int], str], fit: Fit) -> Exhibit:
    margins = fit["margins"] or [None] * fit["length"]
    tokens = tuple(
        Token(pieces(wanted), pieces(came), wanted == came, margin)
        for wanted, came, margin in zip(fit["target_ids"], fit["decoded_ids"], margins, strict=True)
    )
    about = [
        f"arrangement {fit['arrangement']}" if fit["mode"] == "one-forward"
        else f"autoregressive, K = {fit['vectors']}",
        {None: "nothing shared", "m": "m shared", "e": "e shared"}[fit["share"]],
        f"seed {fit['seed']}", f"recipe {fit['recipe']}", f"{fit['steps']} updates",
        f"H_LM {fit['h_lm']:.1f} nats",
    ]  # fmt: skip
    return Exhibit(
        f"{fit['key']}-{fit['row']}", experiment, subject.name, fit["source"],
        fit["length"], sum(t.right for t in tokens), fit["margin"], " · ".join(about), tokens,
    )  # fmt: skip


def _pieces(model: str, measured: Mapping[str, Any]) -> Callable[[int], str]:
    """Return the text of each id, as `measure` kept it; else its number where no tokenizer is."""
    kept = measured.get("tokens", {}).get("texts", {}).get(model)
    if kept is not None:
        return lambda i: str(kept.get(str(i), f"⟨{i}⟩"))
    return tokens_of(model) or (lambda i: f"⟨{i}⟩")


@lru_cache(maxsize=8)
def tokens_of(model: str) -> Callable[[int], str] | None:
    """Return what gives the text of an id; None where the model's tokenizer is not here."""
    try:
        tokenizer: Any = tokenizer_of(model)
    except ValueError:
        return None
    return lambda i: str(tokenizer.decode([i], clean_up_tokenization_spaces=False))
