"""The smallest thing a sweep fits and records, and the key it is recorded under."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MODES = ("one-forward", "autoregressive")


@dataclass(frozen=True)
class Unit:
    """What is fitted: the rows (texts[i], seeds[i]) that share a vector, or a single row.

    Attributes:
        mode: "one-forward" fits e and m, "autoregressive" fits `vectors` [mem] vectors.
        model: a hub id, folder or built-in name; `@revision` may follow, `random:` may stand in
            front (see `prototok.sweep.models`).
        source: name of the source the texts are from.
        texts: ids of the texts in the run's texts.parquet; the target is the first `length` tokens.
        seeds: of the initial vectors, one beside each text.
        length: N.
        share: None, "m" or "e": what all rows of this unit have in common.
        group_size: texts a sharing group, as the experiment asked for it; None for all of them.
        arrangement: of the one-forward mode (`prototok.results.arrangement`).
        vectors: K of the autoregressive mode.
        prefix: what stands in front, text, token ids or None; "auto" leaves it to the recipe.
        recipe: name of a recipe; `changes` are the `Recipe` fields that differ from it.
        dtype: of the frozen weights, "auto" to let the device decide.
        alone: fit this unit with nothing beside it in the batch (the paper's Table 4).
        timed: time the decoding of each exact row at batch 1 (the paper's Figure 3).
    """

    mode: str
    model: str
    source: str
    texts: tuple[str, ...]
    seeds: tuple[int, ...]
    length: int
    share: str | None = None
    group_size: int | None = None
    arrangement: str = "e m*"
    vectors: int = 1
    prefix: str | tuple[int, ...] | None = "auto"
    recipe: str = "paper"
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    alone: bool = False
    timed: bool = False

    @property
    def key(self) -> str:
        """24 hexadecimal digits, the same for the same specification everywhere."""
        return hashlib.sha256(self.spec().encode()).hexdigest()[:24]

    def spec(self) -> str:
        """The specification as canonical JSON: sorted names, no spaces.

        A prefix that is left to the recipe is not named, so that keys are those from before there
        were any.
        """
        named = dataclasses.asdict(self)
        if self.prefix == "auto":
            del named["prefix"]
        return json.dumps(named, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def parse(cls, spec: str) -> Unit:
        """The unit that `spec` gave."""
        found = json.loads(spec)
        for name in ("texts", "seeds", "prefix"):
            if isinstance(found.get(name), list):
                found[name] = tuple(found[name])
        return cls(**found)

    def group(self) -> tuple:
        """Units of equal `group()` can be fitted in one batch; the length may differ."""
        return (
            self.model, self.dtype, self.mode, self.arrangement, self.vectors, self.prefix,
            self.recipe, json.dumps(self.changes, sort_keys=True), self.share, self.alone,
            self.timed,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """Rows × N: what one step of this unit computes."""
        return len(self.texts) * self.length


def text_id(ids: Sequence[int]) -> str:
    """16 hexadecimal digits of the token ids: what units call a text."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
